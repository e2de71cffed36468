"""Who gets which optimiser, and how they step: Muon for hidden matrices, AdamW for embeddings, heads, norms, gates
and the router."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step35.config.model import ModelConfig
from step35.config.train import MuonConfig, TrainConfig
from step35.errors import DivergedError
from step35.model.layout import layout
from step35.train.muon import Matrices, Muon

ADAMW_NAMES = ("embed_tokens.", "head.", "gate_proj.", "router.")
"""Names (parts of them) of the matrices that AdamW updates."""


@dataclass(frozen=True)
class Assignment:
    """One parameter's optimiser; `sizes` are the packed matrices along `dim` for Muon."""

    name: str
    optimiser: str
    sizes: tuple[int, ...] = ()
    dim: int = 0
    decays: bool = True


def assign(config: ModelConfig, named: Mapping[str, Tensor], kind: str) -> list[Assignment]:
    """Return the table of parameters and optimisers that `--dry-run` prints."""
    parts = layout(config)
    table = []
    for name, parameter in named.items():
        matrix = parameter.ndim >= 2 and not any(mark in name for mark in ADAMW_NAMES)
        if kind == "muon" and matrix:
            packed = parts[name]
            dim = packed[0].dim
            table.append(Assignment(name, "muon", tuple(part.length for part in packed), dim))
        else:
            table.append(Assignment(name, "adamw", decays=parameter.ndim >= 2))
    return table


def build_optimisers(
    named: Mapping[str, Tensor], config: ModelConfig, train: TrainConfig
) -> list[torch.optim.Optimizer]:
    """Return [Muon, AdamW] or [AdamW] over all parameters, given by name.

    Those without a gradient, such as a frozen router, are left alone by both, and every stage's optimisers fit the
    state of the one before.
    """
    table = assign(config, named, train.optim.kind)
    optimisers: list[torch.optim.Optimizer] = []
    if isinstance(train.optim, MuonConfig):
        matrices = [Matrices(named[a.name], a.dim, a.sizes) for a in table if a.optimiser == "muon"]
        dtype = getattr(torch, train.optim.iteration_dtype)
        optimisers.append(
            Muon(
                matrices,
                lr=train.lr,
                momentum=train.optim.momentum,
                weight_decay=train.weight_decay,
                steps=train.optim.steps,
                smallest=train.optim.smallest,
                dtype=dtype,
            )
        )
    adamw = [a for a in table if a.optimiser == "adamw"]
    groups = [
        {"params": [named[a.name] for a in adamw if a.decays], "weight_decay": train.weight_decay},
        {"params": [named[a.name] for a in adamw if not a.decays], "weight_decay": 0.0},
    ]
    optimisers.append(torch.optim.AdamW(groups, lr=train.lr, betas=train.optim.adamw_betas, fused=True))
    return optimisers


def apply_gradients(
    optimisers: Sequence[torch.optim.Optimizer], *, lr: float, clip: float, loss: float, where: str
) -> float:
    """Clip the accumulated gradient, apply it at rate `lr`, drop it; return its norm before clipping.

    Raises `DivergedError`, naming `where`, instead of applying a gradient that is not finite.
    """
    parameters = [p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
    if not (math.isfinite(norm) and math.isfinite(loss)):
        drop_gradients(optimisers)
        raise diverged(loss, norm, where)
    step_optimisers(optimisers, lr)
    return norm


def step_optimisers(optimisers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Apply the gradients at rate `lr` and drop them."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
    drop_gradients(optimisers)


def drop_gradients(optimisers: Sequence[torch.optim.Optimizer]) -> None:
    """Forget the gradients."""
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)


def diverged(loss: float, norm: float, where: str) -> DivergedError:
    """Return the error of a loss or gradient that is not finite."""
    return DivergedError(
        f"{where}: loss={loss}, gradient norm={norm}. The update was not applied. Look at the curves "
        "(`step35 runs plot`), and start a run of its own (another --out) with a lower learning rate."
    )
