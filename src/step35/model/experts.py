"""The routed experts: one sort and two grouped products for many tokens, a gather for a few, and a plain reference.

All three compute sum_k weight_k * down_{e_k}(swiglu(gate_up_{e_k}(x))); tests hold them to each other.
"""

# N tokens  D model  I expert hidden  E experts  K chosen  R = N*K routed rows

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step35.model.mlp import swiglu


class Experts(nn.Module):
    """E independent SwiGLU experts: gate and up packed as (E, 2I, D), down as (E, D, I)."""

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int, clip: float) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.clip = clip

    def forward(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs (N, D)."""
        few = chosen_NK.numel() <= len(self.down_proj) and not torch.is_grad_enabled()
        path = self.gathered if few else self.grouped
        return path(x_ND, weights_NK, chosen_NK)

    def grouped(
        self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor, statistics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Sort the rows by expert once, so that each expert's tokens are one block of a grouped product."""
        experts, top_k = len(self.down_proj), chosen_NK.shape[1]
        order_R = chosen_NK.flatten().argsort(stable=True)
        counts_E = torch.bincount(chosen_NK.flatten(), minlength=experts)
        ends_E = counts_E.cumsum(0).int()
        rows_RD = x_ND[order_R // top_k]
        hidden = _grouped_product(rows_RD, self.gate_up_proj, ends_E)
        active = swiglu(hidden, self.clip)
        if statistics is not None:
            statistics.update(_statistics(hidden.detach(), active.detach(), counts_E, self.clip))
        out_RD = _grouped_product(active, self.down_proj, ends_E)
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=x_ND.device))
        out_NKD = out_RD[place_R].unflatten(0, chosen_NK.shape)
        return torch.einsum("nkd,nk->nd", out_NKD, weights_NK.to(x_ND.dtype))

    def gathered(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """Fetch just the chosen experts' matrices: less work than sorting when decoding a few tokens."""
        gate_up = self.gate_up_proj[chosen_NK].to(x_ND.dtype)
        down = self.down_proj[chosen_NK].to(x_ND.dtype)
        active = swiglu(torch.einsum("nkid,nd->nki", gate_up, x_ND), self.clip)
        return torch.einsum("nkdi,nki->nd", down, active * weights_NK.to(x_ND.dtype)[..., None])

    def reference(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """Visit the experts one after the other."""
        out_ND = torch.zeros_like(x_ND)
        for expert in range(len(self.down_proj)):
            token, slot = (chosen_NK == expert).nonzero(as_tuple=True)
            active = swiglu(F.linear(x_ND[token], self.gate_up_proj[expert].to(x_ND.dtype)), self.clip)
            out = F.linear(active, self.down_proj[expert].to(x_ND.dtype))
            out_ND = out_ND.index_add(0, token, out * weights_NK[token, slot, None].to(x_ND.dtype))
        return out_ND


def _grouped_product(rows: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the e-th block of rows by weight[e]^T; `ends_E` holds where each block ends."""
    return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends_E)


def _statistics(hidden: Tensor, active: Tensor, counts_E: Tensor, clip: float) -> dict[str, Tensor]:
    """Return each expert's activation RMS and the share of activations that the clip changed."""
    expert_R = torch.repeat_interleave(torch.arange(len(counts_E), device=hidden.device), counts_E)
    square_R = active.float().square().mean(-1)
    square_E = torch.zeros(len(counts_E), device=hidden.device).index_add_(0, expert_R, square_R)
    rms_E = (square_E / counts_E.clamp(min=1)).sqrt()
    gate, up = hidden.chunk(2, dim=-1)
    over = (F.silu(gate) > clip) | (up.abs() > clip) if clip > 0 else torch.zeros(1)
    return {"rms_E": rms_E, "clipped": over.float().mean()}
