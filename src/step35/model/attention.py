"""Grouped-query attention with per-head QK-norm, rotary positions and the head-wise gate (section 2, A.1)."""

# B batch  T tokens  D model  H query heads  K kv heads  C head dim

from __future__ import annotations

import torch
from torch import Tensor, nn

from step35.config.model import LayerConfig
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
        qk, v = heads.split([layer.heads + layer.kv_heads, layer.kv_heads], dim=-2)
        # Query and key heads are normed and rotated as one tensor: half the small operations of doing it twice.
        rows = [self.q_norm.weight.expand(layer.heads, -1), self.k_norm.weight.expand(layer.kv_heads, -1)]
        qk = rotate(rms_norm(qk, torch.cat(rows), self.q_norm.eps), *context.rope(layer, x_BTD.dtype))
        q, k = qk.split([layer.heads, layer.kv_heads], dim=-2)
        y_BTHC = context.attend(layer, q, k, v)
        gate_BTH = torch.sigmoid(self.gate_proj(x_BTD))
        if context.observer is not None:
            context.observer.attention(layer, context, q.detach(), k.detach(), gate_BTH.detach())
        return self.o_proj((y_BTHC * gate_BTH[..., None]).flatten(-2))
