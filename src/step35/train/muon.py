"""Muon: momentum, orthogonalised matrix by matrix (report sections 3 and 4.1).

A parameter may hold several matrices: experts stacked in the first dimension, q/k/v or gate/up packed by rows.
Each is orthogonalised on its own, and all matrices of one shape go through Polar Express as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step35.train.polar import polar_express


@dataclass(frozen=True)
class Matrices:
    """A parameter and how to cut it: `sizes` along `dim` are the extents of the packed matrices."""

    parameter: Tensor
    dim: int
    sizes: tuple[int, ...]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return views of `tensor` (shaped like the parameter) as (n, rows, columns) batches, one a packed matrix."""
        return [part.reshape(-1, *part.shape[-2:]) for part in torch.split(tensor, list(self.sizes), dim=self.dim)]


class Muon(torch.optim.Optimizer):
    """theta <- theta (1 - lr * weight_decay) - lr * 0.2 sqrt(max(rows, columns)) * polar(Nesterov momentum).

    The scale gives updates the RMS of AdamW's, so that its learning rates carry over.
    """

    def __init__(
        self,
        matrices: Iterable[Matrices],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        steps: int = 6,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self.matrices = list(matrices)
        self.polar: dict[str, Any] = {"steps": steps, "dtype": dtype}
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([entry.parameter for entry in self.matrices], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        group = self.param_groups[0]
        active = [entry for entry in self.matrices if entry.parameter.grad is not None]
        directions = [part for entry in active for part in entry.split(self._momentum(entry.parameter, group))]
        targets = [part for entry in active for part in entry.split(entry.parameter)]
        for entry in active:
            entry.parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for update, target in zip(orthogonalised(directions, **self.polar), targets, strict=True):
            target.add_(update, alpha=-group["lr"] * 0.2 * max(target.shape[-2:]) ** 0.5)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(state["momentum"], group["momentum"])


def orthogonalised(batches: list[Tensor], **polar: Any) -> list[Tensor]:
    """Orthogonalise batches (n, rows, columns), those of one shape (or its transpose) together."""
    results: list[Tensor | None] = [None] * len(batches)
    shapes = sorted({tuple(sorted(batch.shape[-2:])) for batch in batches})
    for shape in shapes:
        numbers = [i for i, batch in enumerate(batches) if tuple(sorted(batch.shape[-2:])) == shape]
        wide = [batches[i] if batches[i].shape[-2] <= batches[i].shape[-1] else batches[i].mT for i in numbers]
        done = torch.split(polar_express(torch.cat(wide), **polar), [len(batch) for batch in wide])
        for i, result in zip(numbers, done, strict=True):
            results[i] = result if batches[i].shape == result.shape else result.mT
    return [result for result in results if result is not None]
