"""Grouped-query attention with per-head QK-norm, rotary positions and the head-wise gate (section 2, A.1)."""

# B batch  T tokens  D model  H query heads  K kv heads  C head dim

from __future__ import annotations

import torch
from torch import Tensor, nn

from step35.config.model import LayerConfig
from step35.model.context import Context
from step35.model.linear import Linear
from step35.model.norm import RMSNorm
from step35.model.rope import rotate


class Attention(nn.Module):
    """out = W_o [ sigmoid(w_gate . x)_h * attention_h(x) ]_h, full or sliding as `layer.window` says.

    The gate equals an input-dependent sink in the softmax normaliser, and is read from the normed block input x.
    q, k and v projections are packed row-wise in one matrix.
    """

    def __init__(self, layer: LayerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.layer = layer
        self.rows = [
            layer.heads * layer.head_dim,
            layer.kv_heads * layer.head_dim,
            layer.kv_heads * layer.head_dim,
        ]
        self.qkv_proj = Linear(hidden_size, sum(self.rows))
        self.gate_proj = Linear(hidden_size, layer.heads)
        self.o_proj = Linear(layer.heads * layer.head_dim, hidden_size)
        self.q_norm = RMSNorm(layer.head_dim, eps)
        self.k_norm = RMSNorm(layer.head_dim, eps)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.layer.head_dim)) for part in self.qkv_proj(x_BTD).split(self.rows, dim=-1)
        )
        cos, sin = context.rope(self.layer, x_BTD.dtype)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y_BTHC = context.attend(self.layer, q, k, v)
        gate_BTH = torch.sigmoid(self.gate_proj(x_BTD))
        return self.o_proj((y_BTHC * gate_BTH[..., None]).flatten(-2))
