"""How much activation clipping changes: the share of clipped activations (section 4.1, third)."""

# R rows  I hidden

from __future__ import annotations

import math
from functools import cache

from torch import Tensor

from step35.train.monitors.measure import Measure

MEASURES = (
    Measure(
        "clip_share",
        "share of (row, channel) places of routed experts where silu(gate) > limit or \\|up\\| > limit, over every "
        "fourth row; mean over the layers that clip",
        "below 0.01",
        "a rising share in a late layer is a blow-up that the clip holds back: look at `expert_output` and the "
        "data's most frequent bi-grams; above 0.1 the limit shapes the model, so raise it",
    ),
    Measure("clip_share.layer_LAYER", "the same, of one layer's routed experts", "below 0.01", "as above"),
    Measure(
        "clip_share_shared.layer_LAYER",
        "the same, of the layer's shared expert or dense MLP",
        "below 0.01",
        "as above",
    ),
    Measure("expert_clip", "panel: the same, by expert", "below 0.01 everywhere", "one expert alone: see blow-up"),
)

EVERY = 4
"""One row in so many is looked at: all of them cost 0.5% of a small model's step."""


@cache
def inverse_silu(value: float) -> float:
    """Return the gate at which silu(gate) = value, for value > 0, where SiLU is invertible."""
    low, high = value, value + 1.0  # silu(x) < x, and silu(x + 1) > x for x > 0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle / (1 + math.exp(-middle)) < value else (low, middle)
    return (low + high) / 2


def clipped_share(hidden: Tensor, clip: float) -> Tensor:
    """Return for each row of gate and up (..., 2I) the share of its I places that the clip changes, (...), fp32."""
    gate, up = hidden.chunk(2, dim=-1)
    # Held against the gate itself, which saves a second SiLU.
    return ((gate > inverse_silu(clip)) | (up.abs() > clip)).float().mean(-1)
