"""Weight clipping of routed experts, offline on a checkpoint (section 4.1, third).

For every projection W of every expert: when max_x |W x| > tau, W <- W * tau / max_x |W x|, x over what the expert
reads in given tokens and |.| the Euclidean norm. The report compared it with activation clipping: it only delays a
blow-up. All maxima are of the model as it was; a clipped gate or up makes the down projection's input smaller still.
"""

# R routed rows  I expert hidden  D model  E experts

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from step35.config.model import LayerConfig
from step35.data.packing import Batch
from step35.model.context import Context, RoutedRows
from step35.model.step35 import Step35

PROJECTIONS = ("gate", "up", "down")


class Clipped(NamedTuple):
    """One matrix that was scaled down."""

    layer: int
    expert: int
    projection: str
    largest: float
    """max |W x| before."""


class LargestProducts:
    """Keeps max |W x| of each layer's experts (3, E) for gate, up and down (`Observer`)."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self.by_layer: dict[int, Tensor] = {}

    def experts(self, layer: int, clip: float, rows: RoutedRows) -> None:
        """Take in one layer's rows."""
        gate_RI, up_RI = rows.hidden_R2I.chunk(2, dim=-1)
        norms_3R = torch.stack([torch.linalg.vector_norm(x.float(), dim=-1) for x in (gate_RI, up_RI, rows.out_RD)])
        before = self.by_layer.get(layer, norms_3R.new_zeros(3, self._experts))
        self.by_layer[layer] = before.scatter_reduce(1, rows.expert_R.expand(3, -1), norms_3R, "amax")

    def attention(self, layer: LayerConfig, context: Context, q: Tensor, k: Tensor, gate: Tensor) -> None:
        """Attention is not clipped."""

    def dense(self, layer: int, clip: float, hidden: Tensor) -> None:
        """Neither are dense MLPs and shared experts."""


@torch.no_grad()
def largest_products(model: Step35, batches: Iterable[Batch]) -> dict[int, Tensor]:
    """Return max |W x| over the batches' tokens for each MoE layer: (3, E) for gate, up and down, 0 for an idle one."""
    seen = LargestProducts(model.config.moe_num_experts)
    device = model.embed_tokens.weight.device
    for batch in batches:
        tokens, segments = (torch.as_tensor(x, device=device) for x in (batch.tokens, batch.segments))
        model.trunk(tokens, Context.packed(tokens, segments, record=True, observer=seen))
    return seen.by_layer


@torch.no_grad()
def clip_weights(model: Step35, largest: dict[int, Tensor], tau: float) -> list[Clipped]:
    """Scale every matrix whose largest product exceeds `tau` down to it, in place; return what was scaled."""
    clipped = []
    for layer, largest_3E in largest.items():
        experts = model.experts(layer)
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        matrices = (gate, up, experts.down_proj)
        for place, expert in (largest_3E > tau).nonzero().tolist():
            value = float(largest_3E[place, expert])
            matrices[place][expert].mul_(tau / value)
            clipped.append(Clipped(layer, expert, PROJECTIONS[place], value))
    return clipped
