"""The sigmoid router with a selection-only bias and an explicit scale (section 2, "Routing and balance")."""

# N tokens  D model  E experts  K chosen

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Choose the top-k of p + bias; weigh by p without bias, renormalised to sum 1, times `scale`.

    Everything is fp32: rounding these weights to bf16 flips choices and moves logits of a small model by 0.9.
    The bias is a buffer: it is moved by observed load, never by a gradient (`train/balance.py`).
    """

    bias: Tensor

    def __init__(self, hidden_size: int, experts: int, top_k: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.register_buffer("bias", torch.zeros(experts))
        self.top_k = top_k
        self.scale = scale

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights (N, K), chosen experts (N, K) and probabilities (N, E), the floats in fp32."""
        probabilities_NE = torch.sigmoid(F.linear(x_ND.float(), self.weight.float()))
        chosen_NK = torch.topk(probabilities_NE.detach() + self.bias.float(), self.top_k, dim=-1).indices
        weights_NK = probabilities_NE.gather(-1, chosen_NK)
        return self.scale * weights_NK / weights_NK.sum(-1, keepdim=True), chosen_NK, probabilities_NE
