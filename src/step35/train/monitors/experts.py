"""Expert health by layer and expert: load, activations and outputs (section 4.1, second and third).

Load alone misses both failure modes: an expert may be routed to and yet be dead (falling min-to-median activation),
or grow without bound while the loss stays flat (rising max-to-median output).
"""

# N tokens  E experts  K chosen  R routed rows  L MoE layers  G groups

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from step35.model.compiled.pointwise import squares
from step35.model.context import RoutedRows, Routing
from step35.train.monitors.clipping import EVERY, clipped_share
from step35.train.monitors.measure import Measure

MEASURES = (
    Measure(
        "load_cv",
        "std(n_e) / mean(n_e) over the experts of a layer, n_e = choices of expert e in the step; mean over layers",
        "0.1 to 0.8",
        "raise `balance_rate` or `ep_weight`; look for repetitive data",
    ),
    Measure("load_cv_max", "the same, of the worst layer", "below 1.5", "as above"),
    Measure(
        "load_imbalance",
        "load_cv_max / sqrt(experts / top-k - 1), which is what a layer has that sends all tokens to the same experts",
        "below 0.5; 1 is total",
        "as above",
    ),
    Measure("expert_load", "panel: n_e / sum n_e", "near 1 / experts", "as above"),
    Measure(
        "dead_experts",
        "number of (layer, expert) without a token in the step",
        "0",
        "raise `balance_rate`; a very small batch also leaves experts idle",
    ),
    Measure("dead_share", "dead_experts / number of (layer, expert)", "0", "as above"),
    Measure(
        "group_load_max",
        "G * load share of the busiest EP group of any layer; 1 is even",
        "below 1.5",
        "raise `ep_weight`: the slowest EP rank sets the pace",
    ),
    Measure("group_load", "panel: load share of each EP group", "near 1 / groups", "as above"),
    Measure(
        "routing_confidence",
        "mean over tokens and layers of sum of p_e over the chosen / sum of p_e over all experts (section 6)",
        "well above top-k / experts, steady",
        "low values foretell a mismatch of training and inference in RL: update on-policy or replay routes",
    ),
    Measure(
        "expert_rms",
        "panel: sqrt(mean over tokens and channels of (silu(gate) * up after clipping)^2) at the FFN intermediate",
        "same order within a layer; 0 is an idle expert",
        "see the ratios",
    ),
    Measure(
        "expert_rms_max_ratio",
        "max over experts / lower median of expert_rms, worst layer, idle experts left out",
        "1 to 4",
        "as for expert_output_max_ratio",
    ),
    Measure(
        "expert_rms_min_ratio",
        "min over experts / lower median of expert_rms, worst layer, idle experts left out",
        "0.3 to 1",
        "falling is collapse: give routed experts an explicit scale, balance on the whole batch (loss-free bias), "
        "lower `ep_weight`",
    ),
    Measure(
        "expert_output",
        "panel: sqrt(mean over tokens of \\|expert output\\|^2), before the router's weight",
        "same order within a layer",
        "see the ratios",
    ),
    Measure(
        "expert_output_max_ratio",
        "max over experts / lower median of expert_output, worst layer",
        "1 to 5",
        "growing is a blow-up: clip activations in that layer (`swiglu_limits`), which costs no loss",
    ),
    Measure("expert_output_min_ratio", "min / lower median of expert_output, worst layer", "0.2 to 1", "see collapse"),
)

HUGE = torch.finfo(torch.float32).max
"""Stands for a ratio to a median of 0, or of an output that is infinite: an alarm is to see it."""

COUNT, SQUARE, OUTPUT, CLIPPED, LOOKED = range(5)
"""Columns of a layer's sums (E, 5) over its rows: 1, mean square of the activation, squared output; and over the rows
whose clipping is looked at: share clipped, 1."""


def expert_sums(rows: RoutedRows, clip: float, real_N: Tensor | None, experts: int) -> Tensor:
    """Return one layer's sums (E, 5) in fp32; `real_N` leaves out the rows of padding tokens."""
    square_R, output_R = squares(rows.active_RI), squares(rows.out_RD)
    clipped_R, looked_R = torch.zeros_like(square_R), torch.zeros_like(square_R)
    if clip > 0:
        clipped_R[::EVERY] = clipped_share(rows.hidden_R2I[::EVERY], clip)
        looked_R[::EVERY] = 1
    columns = [torch.ones_like(square_R), square_R / rows.active_RI.shape[-1], output_R, clipped_R, looked_R]
    values_R5 = torch.stack(columns, dim=1)
    if real_N is not None:
        values_R5 = torch.where(real_N[rows.token_R, None], values_R5, 0.0)  # also where padding is not finite
    return values_R5.new_zeros(experts, 5).index_add_(0, rows.expert_R, values_R5)


def confidence_sums(routing: Routing) -> Tensor:
    """Return (2,): the sum over tokens of the probability share that the chosen experts hold, and the tokens."""
    p = routing.probabilities_NE.detach()
    share_N = p.gather(1, routing.experts_NK).sum(-1) / p.sum(-1)
    return torch.stack([share_N.sum(), share_N.new_tensor(len(share_N))])


def expert_metrics(sums: Mapping[int, Tensor], groups: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return figures over all layers, and for some of them where the worst value is."""
    layers, sums_LE5 = list(sums), torch.stack(list(sums.values())).cpu()
    counts_LE, rms_LE, output_LE = _by_expert(sums_LE5)
    cv_L = counts_LE.std(1, unbiased=False) / counts_LE.mean(1)
    group_LG = groups * counts_LE.view(len(layers), groups, -1).sum(-1) / counts_LE.sum(1, keepdim=True)
    dead = int((counts_LE == 0).sum())
    figures: dict[str, float] = {
        "load_cv": float(cv_L.mean()),
        "load_cv_max": float(cv_L.max()),
        "dead_experts": dead,
        "dead_share": dead / counts_LE.numel(),
        "group_load_max": float(group_LG.max()),
    }
    places = {
        "load_cv_max": f"layer {layers[int(cv_L.argmax())]}",
        "dead_share": ", ".join(f"layer {layers[i]}, expert {e}" for i, e in (counts_LE == 0).nonzero().tolist()[:8]),
    }
    for name, value_LE in (("expert_rms", rms_LE), ("expert_output", output_LE)):
        for side, (ratio, layer, expert) in _ratios(value_LE).items():
            figures[f"{name}_{side}_ratio"] = ratio
            places[f"{name}_{side}_ratio"] = f"layer {layers[layer]}, expert {expert}"
    return figures, places


def expert_panels(sums: Mapping[int, Tensor], groups: int) -> dict[str, Any]:
    """Return the layer x expert panels."""
    sums_LE5 = torch.stack(list(sums.values())).cpu()
    counts_LE, rms_LE, output_LE = (x_LE.nan_to_num(0.0) for x_LE in _by_expert(sums_LE5))
    load_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)
    return {
        "moe_layers": list(sums),
        "expert_load": load_LE.tolist(),
        "group_load": load_LE.view(len(sums), groups, -1).sum(-1).tolist(),
        "expert_rms": rms_LE.tolist(),
        "expert_output": output_LE.tolist(),
        "expert_clip": (sums_LE5[..., CLIPPED] / sums_LE5[..., LOOKED].clamp(min=1)).tolist(),
    }


def _by_expert(sums_LE5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts, RMS and output norm (L, E); the latter two are NaN for an idle expert."""
    counts_LE = sums_LE5[..., COUNT]
    return counts_LE, (sums_LE5[..., SQUARE] / counts_LE).sqrt(), (sums_LE5[..., OUTPUT] / counts_LE).sqrt()


def _ratios(value_LE: Tensor) -> dict[str, tuple[float, int, int]]:
    """Return max and min over the lower median of the worst layer, each with its layer and expert."""
    ratio_LE = value_LE / value_LE.nanmedian(1, keepdim=True).values
    found = {}
    for side, fill in (("max", -math.inf), ("min", math.inf)):
        known_LE = ratio_LE.nan_to_num(nan=fill, posinf=HUGE)
        place = int(known_LE.argmax() if side == "max" else known_LE.argmin())
        layer, expert = divmod(place, value_LE.shape[1])
        ratio = float(known_LE[layer, expert])
        found[side] = (ratio if math.isfinite(ratio) else 1.0, layer, expert)
    return found
