"""Grouped-query attention with per-head QK-norm, rotary positions and the head-wise gate (section 2, A.1)."""

# B batch  T tokens  D model  H query heads  K kv heads  C head dim

from __future__ import annotations

import torch
from torch import Tensor, nn

from step35.config.model import LayerConfig
from step35.model.compiled.library import MOST_HEAD, fits
from step35.model.compiled.pointwise import Gate, NormTurn
from step35.model.context import Context
from step35.model.linear import Linear
from step35.model.norm import RMSNorm, rms_norm
from step35.model.rope import rotate


class Attention(nn.Module):
    """out = W_o [ sigmoid(w_gate . x)_h * attention_h(x) ]_h, full or sliding as `layer.window` says.

    The gate equals an input-dependent sink in the softmax normaliser, and is read from the normed block input x.
    q, k and v projections are packed row-wise in one matrix.
    """

    def __init__(self, layer: LayerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.layer = layer
        self.qkv_proj = Linear(hidden_size, (layer.heads + 2 * layer.kv_heads) * layer.head_dim)
        self.gate_proj = Linear(hidden_size, layer.heads)
        self.o_proj = Linear(layer.heads * layer.head_dim, hidden_size)
        self.q_norm = RMSNorm(layer.head_dim, eps)
        self.k_norm = RMSNorm(layer.head_dim, eps)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        layer = self.layer
        heads = self.qkv_proj(x_BTD).unflatten(-1, (-1, layer.head_dim))
        q, k, v = self._normed_and_turned(heads, *context.rope(layer, x_BTD.dtype))
        y_BTHC = context.attend(layer, q, k, v)
        gate_BTH = self.gate_proj(x_BTD)
        if context.observer is not None:
            context.observer.attention(layer, context, q.detach(), k.detach(), gate_BTH.detach().sigmoid())
        return self.o_proj(gate(y_BTHC, gate_BTH).flatten(-2))

    def _normed_and_turned(self, heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, normed and rotated, and values of packed heads (B, T, H + 2 K, C)."""
        layer, eps = self.layer, self.q_norm.eps
        if fits(heads) and layer.head_dim <= MOST_HEAD:
            weights = 1.0 + self.q_norm.weight.float(), 1.0 + self.k_norm.weight.float()
            return NormTurn.apply(heads, *weights, cos, sin, layer.heads, eps)  # type: ignore[no-untyped-call]
        qk, v = heads.split([layer.heads + layer.kv_heads, layer.kv_heads], dim=-2)
        # Query and key heads are normed and rotated as one tensor: half the small operations of doing it twice.
        rows = [self.q_norm.weight.expand(layer.heads, -1), self.k_norm.weight.expand(layer.kv_heads, -1)]
        q, k = rotate(rms_norm(qk, torch.cat(rows), eps), cos, sin).split([layer.heads, layer.kv_heads], dim=-2)
        return q, k, v


def gate(y_BTHC: Tensor, gate_BTH: Tensor) -> Tensor:
    """Return each head's output times the sigmoid of its gate."""
    if fits(y_BTHC):
        return Gate.apply(y_BTHC, gate_BTH)  # type: ignore[no-any-return,no-untyped-call]
    return y_BTHC * torch.sigmoid(gate_BTH)[..., None]
