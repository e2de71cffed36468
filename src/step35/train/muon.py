"""Muon: momentum, orthogonalised matrix by matrix (report sections 3 and 4.1).

A parameter may hold several matrices: experts stacked in the first dimension, q/k/v or gate/up packed by rows.
Each is orthogonalised on its own; matrices of one shape, of whatever parameter, go through Polar Express in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step35.train.polar import polar_express

BATCH_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
"""Elements of a batch: on a CPU what a core's cache holds through all steps (twice as fast as one large batch)."""


@dataclass(frozen=True)
class Matrices:
    """A parameter and how to cut it: `sizes` along `dim` are the extents of the packed matrices."""

    parameter: Tensor
    dim: int
    sizes: tuple[int, ...]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return views (rows, columns) of each matrix in `tensor`, which is shaped like the parameter."""
        parts = torch.split(tensor, list(self.sizes), dim=self.dim)
        return [matrix for part in parts for matrix in part.view(-1, *part.shape[-2:]).unbind()]


class Muon(torch.optim.Optimizer):
    """M <- m M + (1 - m) G;  W <- W (1 - lr * weight_decay) - lr * 0.2 sqrt(max(rows, columns)) * polar(N).

    N = m M + (1 - m) G is Nesterov's look-ahead. The scale gives updates the RMS of AdamW's, so that its learning
    rates carry over. `polar` holds the settings of `polar_express`.
    """

    def __init__(
        self,
        matrices: Iterable[Matrices],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        **polar: Any,
    ) -> None:
        self.matrices = list(matrices)
        self.polar = polar
        self._singular_rms: list[tuple[list[Tensor], Tensor]] = []
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([entry.parameter for entry in self.matrices], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients are used up (they hold the look-ahead afterwards)."""
        group = self.param_groups[0]
        active = [entry for entry in self.matrices if entry.parameter.grad is not None]
        directions = [matrix for entry in active for matrix in entry.split(self._momentum(entry.parameter, group))]
        owned = [(entry.parameter, matrix) for entry in active for matrix in entry.split(entry.parameter)]
        owners, targets = [owner for owner, _ in owned], [matrix for _, matrix in owned]
        self._singular_rms.clear()
        for entry in active:
            entry.parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for numbers in batches([matrix.shape for matrix in targets], targets[0].device.type if targets else "cpu"):
            updates = polar_express(torch.stack([directions[i] for i in numbers]), **self.polar)
            rms = torch.linalg.vector_norm(updates, dim=(-2, -1)) / min(updates.shape[-2:]) ** 0.5
            self._singular_rms.append(([owners[i] for i in numbers], rms))
            rate = group["lr"] * 0.2 * max(updates.shape[-2:]) ** 0.5
            torch._foreach_add_([targets[i] for i in numbers], list(updates.unbind()), alpha=-rate)

    def largest_rms(self) -> tuple[float, Tensor] | None:
        """Return the largest RMS of a matrix's singular values in the last step's update, and its parameter.

        It is 1 when the iteration worked and the gradient had full rank, less for a lower rank. None without a step.
        """
        if not self._singular_rms:
            return None
        owners = [owner for some, _ in self._singular_rms for owner in some]
        rms = torch.cat([values for _, values in self._singular_rms])
        worst = int(rms.argmax())
        return float(rms[worst]), owners[worst]

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Take the gradient into the momentum; return the look-ahead, in the gradient's memory."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp_(state["momentum"], group["momentum"])


def batches(shapes: list[torch.Size], device: str) -> Iterator[list[int]]:
    """Yield the numbers of the matrices to orthogonalise together: those of one shape, so many at a time."""
    for shape in sorted(set(shapes)):
        numbers = [i for i, other in enumerate(shapes) if other == shape]
        size = max(1, BATCH_ELEMENTS.get(device, BATCH_ELEMENTS["cuda"]) // shape.numel())
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))
