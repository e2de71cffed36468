"""Norms of gradients, parameters and updates per matrix class, and of each expert's projections."""

# L MoE layers  E experts  I expert hidden  D model

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from step35.model.step35 import Step35
from step35.train.monitors.measure import Measure

MEASURES = (
    Measure(
        "grad_norm", "norm of the whole gradient before clipping", "steady; near grad_clip or below",
        "see gradient_spike",
    ),
    Measure("grad_norm.CLASS", "the same, of one matrix class", "steady", "names the part that a spike came from"),
    Measure(
        "grad_norm_ratio", "grad_norm / its running mean over `stability.window` steps", "0.3 to 3",
        "single spikes are data: skip the batch; a rising level: lower `lr`",
    ),
    Measure("param_norm", "norm of all parameters", "grows slowly, then levels off", "raise `weight_decay`"),
    Measure("param_norm.CLASS", "the same, of one matrix class", "grows slowly, then levels off", "as above"),
    Measure(
        "muon_rms",
        "\\|O\\|_F / sqrt(min(rows, columns)), O the orthogonalised momentum: the RMS of its singular values; the "
        "largest of all matrices",
        "0.8 to 1.05; less where gradients have a low rank",
        "see muon_outlier: one singular value of s gives about s / sqrt(min(rows, columns))",
    ),
    Measure(
        "update_rms",
        "max over classes of update_rms.CLASS",
        "0.1 to 1",
        "see update_rms.CLASS",
    ),
    Measure(
        "update_rms.CLASS",
        "RMS of (new - old weight) / learning rate, over at most 8,192 elements a parameter, in evenly spaced runs",
        "near 0.2 for Muon's matrices of full rank, below 1 for AdamW's",
        "more says that something else than the optimiser changed the weights; single matrices: see muon_rms",
    ),
    Measure(
        "expert_gate_norm", "panel: Frobenius norm of each expert's gate projection", "same order within a layer",
        "a falling minimum is collapse, see expert_norm_min_ratio",
    ),
    Measure("expert_up_norm", "panel: the same, of the up projection", "same order within a layer", "as above"),
    Measure("expert_down_norm", "panel: the same, of the down projection", "same order within a layer", "as above"),
    Measure(
        "expert_norm_max_ratio", "max over experts / lower median of these norms, worst layer and projection", "1 to 3",
        "a blow-up may leave it flat: weights stay small while gate and up align; trust expert_output",
    ),
    Measure(
        "expert_norm_min_ratio", "min over experts / lower median of these norms, worst layer and projection",
        "0.5 to 1", "falling is collapse: explicit router scale, loss-free bias, lower `ep_weight`",
    ),
)  # fmt: skip

CLASSES = (
    ("mtp", "mtp."),
    ("norm", "norm.weight"),
    ("embedding", "embed_tokens."),
    ("head", "lm_head."),
    ("router", ".router."),
    ("experts_in", ".experts.gate_up_proj"),
    ("experts_out", ".experts.down_proj"),
    ("shared", ".shared."),
    ("dense", ".mlp."),
    ("qkv", ".qkv_proj."),
    ("attention_out", ".o_proj."),
    ("gate", ".gate_proj."),
)
"""Matrix classes and what their parameters' names contain; the first match counts."""

RUNS, RUN = 128, 64
"""Runs of neighbouring elements of a parameter whose change is measured: 8,192 single ones cost half as much again."""


def matrix_class(name: str) -> str:
    """Return the class of the parameter called `name`."""
    return next((label for label, mark in CLASSES if mark in name), "other")


def norms(named: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Return the joint norm, as `clip_grad_norm_` computes it, and the norm of each tensor."""
    each = torch.stack(torch._foreach_norm(list(named.values())))
    return torch.linalg.vector_norm(each), dict(zip(named, each.tolist(), strict=True))


def by_class(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the joint norm of each class as `prefix.CLASS`."""
    squares: dict[str, float] = {}
    for name, value in values.items():
        key = f"{prefix}.{matrix_class(name)}"
        squares[key] = squares.get(key, 0.0) + value * value
    return {key: math.sqrt(square) for key, square in squares.items()}


class UpdateSample:
    """A sample of the parameters before an update, to measure the update by."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named = named
        self.before = [_sample(tensor).clone() for tensor in named.values()]

    def rms(self, lr: float) -> dict[str, float]:
        """Return each class's RMS change in units of the learning rate; nothing when the rate is 0."""
        if lr == 0:
            return {}
        changes = torch._foreach_sub([_sample(tensor) for tensor in self.named.values()], self.before)
        _, change = norms(dict(zip(self.named, changes, strict=True)))
        counts: dict[str, int] = {}
        for name, old in zip(self.named, self.before, strict=True):
            key = f"update_rms.{matrix_class(name)}"
            counts[key] = counts.get(key, 0) + old.numel()
        return {key: norm / math.sqrt(counts[key]) / lr for key, norm in by_class(change, "update_rms").items()}


def _sample(tensor: Tensor) -> Tensor:
    """Return a view of the evenly spaced runs, which do not overlap; of a small tensor all of it."""
    size = tensor.numel()
    flat = tensor.detach().view(-1)
    return flat if size <= RUNS * RUN else flat.as_strided((RUNS, RUN), ((size - RUN) // (RUNS - 1), 1))


@torch.no_grad()
def expert_norms(model: Step35) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the ratios over all layers and projections, and the layer x expert panels of Frobenius norms."""
    experts = [model.experts(layer) for layer in model.config.moe_layers_enum]
    if not experts:
        return {}, {}
    gates, ups = zip(*(e.gate_up_proj.float().chunk(2, dim=1) for e in experts), strict=True)
    downs = [e.down_proj.float() for e in experts]
    panels = {
        f"expert_{name}_norm": torch.stack([torch.linalg.vector_norm(w_Exx, dim=(1, 2)) for w_Exx in weights])
        for name, weights in (("gate", gates), ("up", ups), ("down", downs))
    }
    ratios = torch.stack([norm_LE / norm_LE.median(1, keepdim=True).values for norm_LE in panels.values()])
    figures = {"expert_norm_max_ratio": float(ratios.max()), "expert_norm_min_ratio": float(ratios.min())}
    return figures, {name: norm_LE.tolist() for name, norm_LE in panels.items()}
