"""SwiGLU with activation clipping, the dense MLP and the shared expert (sections 2 and 4.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from step35.model.compiled.library import fits
from step35.model.compiled.pointwise import SwiGLU
from step35.model.linear import Linear


def swiglu(gate_up: Tensor, clip: float) -> Tensor:
    """Return silu(gate) * up for gate and up packed in the last dimension.

    With clip > 0 the gate is clamped after SiLU, from above only, and up on both sides. This bounds an expert's
    output whatever its weights do: the adopted remedy against local activation blow-up (section 4.1, third).
    """
    if fits(gate_up[..., : gate_up.shape[-1] // 2]):
        return SwiGLU.apply(gate_up, clip)  # type: ignore[no-any-return,no-untyped-call]
    gate, up = gate_up.chunk(2, dim=-1)
    gate = F.silu(gate)
    if clip > 0:
        gate, up = gate.clamp(max=clip), up.clamp(-clip, clip)
    return gate * up


class MLP(nn.Module):
    """down(swiglu(x)): the FFN of dense layers and MTP layers, and the expert that every token visits."""

    def __init__(self, hidden_size: int, intermediate_size: int, clip: float) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.clip = clip

    def forward(self, x: Tensor, observe: Callable[[Tensor], None] | None = None) -> Tensor:
        hidden = self.gate_up_proj(x)
        if observe is not None:
            observe(hidden.detach())
        return self.down_proj(swiglu(hidden, self.clip))
