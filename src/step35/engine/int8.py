"""Weight-only int8: matrices as 8-bit integers with one fp32 scale for each output; activations stay as they are.

weight[o, :] is scale[o] * integer[o, :], the scale being the row's largest magnitude / 127. Embeddings, norms,
routers and head gates keep their type: they are small, and routing is sensitive to rounding.
"""

# E experts  D model  I expert hidden  N tokens  K chosen

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from step35.model.experts import Experts
from step35.model.linear import Linear
from step35.model.step35 import Step35

LEVELS = 127
KEPT = ("gate_proj",)
"""Linear layers that keep their type."""


class Int8Linear(nn.Module):
    """`Linear` with an int8 weight (out, in) and `scales` (out,)."""

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        _register(self, "weight", "scales", linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scales.to(x.dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        _take(self.weight, self.scales, state_dict[f"{prefix}weight"])


class Int8Experts(nn.Module):
    """`Experts` with int8 matrices; they are widened, a layer at a time, where `Experts` itself computes."""

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_scales: Tensor
    down_scales: Tensor

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        _register(self, "gate_up_proj", "gate_up_scales", experts.gate_up_proj)
        _register(self, "down_proj", "down_scales", experts.down_proj)
        self.clip = experts.clip
        self._wide = (experts.to("meta"),)  # in a tuple, so that its parameters are not ours

    def forward(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        wide = {
            "gate_up_proj": self.gate_up_proj.to(x_ND.dtype) * self.gate_up_scales.to(x_ND.dtype)[..., None],
            "down_proj": self.down_proj.to(x_ND.dtype) * self.down_scales.to(x_ND.dtype)[..., None],
        }
        out: Tensor = functional_call(self._wide[0], wide, (x_ND, weights_NK, chosen_NK))
        return out

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        _take(self.gate_up_proj, self.gate_up_scales, state_dict[f"{prefix}gate_up_proj"])
        _take(self.down_proj, self.down_scales, state_dict[f"{prefix}down_proj"])


@torch.no_grad()
def quantise(model: Step35) -> Step35:
    """Replace the model's matrices, one after the other; it still takes the state of a model with plain ones."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and name not in KEPT:
                setattr(module, name, Int8Linear(child))
            elif isinstance(child, Experts):
                setattr(module, name, Int8Experts(child))
    return model


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (..., out, in) as int8 and the scales (..., out) that restore it."""
    scales = weight.float().abs().amax(-1) / LEVELS
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight.float() / scales[..., None]).round().to(torch.int8), scales


def _register(module: nn.Module, name: str, scales_name: str, weight: Tensor) -> None:
    integers, scales = round_rows(weight.detach())
    module.register_buffer(name, integers)
    module.register_buffer(scales_name, scales)


def _take(integers: Tensor, scales: Tensor, weight: Tensor) -> None:
    """Take a new weight, in place."""
    for target, new in zip((integers, scales), round_rows(weight), strict=True):
        target.copy_(new)
