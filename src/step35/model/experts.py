"""The routed experts: grouped products for many tokens, two ways for the few of a decode step, a plain reference.

All compute sum_k weight_k * down_{e_k}(swiglu(gate_up_{e_k}(x))); tests hold them to each other.
"""

# N tokens  D model  I expert hidden  E experts  K chosen  R = N*K routed rows

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step35.model.compiled.grouped import Grouped, fits_grouped
from step35.model.compiled.library import fits
from step35.model.compiled.pointwise import Combine, Dispatch
from step35.model.context import RoutedRows
from step35.model.mlp import swiglu

FEW_TOKENS = 16
"""Up to this many tokens, sorting them by expert costs more than it saves."""


class Experts(nn.Module):
    """E independent SwiGLU experts: gate and up packed as (E, 2I, D), down as (E, D, I)."""

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int, clip: float) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.clip = clip

    def forward(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs (N, D)."""
        if torch.is_grad_enabled() or (len(x_ND) > FEW_TOKENS and not _must_not_wait(x_ND)):
            path = self.grouped
        elif 3 * chosen_NK.numel() >= len(self.down_proj):
            path = self.dense
        else:
            path = self.gathered
        return path(x_ND, weights_NK, chosen_NK)

    def grouped(
        self,
        x_ND: Tensor,
        weights_NK: Tensor,
        chosen_NK: Tensor,
        observe: Callable[[RoutedRows], None] | None = None,
    ) -> Tensor:
        """Sort the rows by expert once, so that each expert's tokens are one block of a grouped product.

        `observe` is shown the rows, detached.
        """
        experts, top_k = len(self.down_proj), chosen_NK.shape[1]
        sorted_R, order_R = chosen_NK.flatten().sort(stable=True)
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=x_ND.device))
        # Not by `bincount`, for which a GPU stops to tell the host how long the result is.
        ends_E = torch.searchsorted(sorted_R, torch.arange(experts, device=x_ND.device), right=True).int()
        place_NK, compiled = place_R.view(chosen_NK.shape), fits(x_ND)
        if compiled:
            rows_RD = Dispatch.apply(x_ND, order_R // top_k, place_NK)
        else:
            rows_RD = Permutation.apply(x_ND[:, None].expand(-1, top_k, -1).flatten(0, 1), order_R, place_R)
        hidden = _grouped_product(rows_RD, self.gate_up_proj, ends_E)
        active = swiglu(hidden, self.clip)
        out_RD = _grouped_product(active, self.down_proj, ends_E)
        if observe is not None:
            observe(RoutedRows(sorted_R, order_R // top_k, hidden.detach(), active.detach(), out_RD.detach()))
        if compiled:
            return Combine.apply(out_RD, weights_NK.float(), place_NK)  # type: ignore[no-any-return,no-untyped-call]
        out_NKD = Permutation.apply(out_RD, place_R, order_R).unflatten(0, chosen_NK.shape)
        # A sum of products, since einsum makes N tiny matrix products of it: 3 times slower at 512 columns on a CPU.
        return (out_NKD * weights_NK.to(x_ND.dtype)[..., None]).sum(1)

    def dense(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """Run every expert and weigh the idle ones by 0: reads each matrix once, where `gathered` copies it first."""
        experts, width = self.gate_up_proj.shape[:2]
        hidden = F.linear(x_ND, self.gate_up_proj.to(x_ND.dtype).flatten(0, 1)).unflatten(1, (experts, width))
        weights_NE = x_ND.new_zeros(len(x_ND), experts).scatter_(1, chosen_NK, weights_NK.to(x_ND.dtype))
        active = swiglu(hidden, self.clip) * weights_NE[..., None]
        return torch.bmm(active.transpose(0, 1), self.down_proj.to(x_ND.dtype).mT).sum(0)

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


class Permutation(torch.autograd.Function):
    """rows[order], whose gradient is gathered by the inverse order: indexing would scatter-add it, far slower."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _must_not_wait(x_ND: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, and torch's grouped product would ask the host for sizes."""
    if not x_ND.is_cuda or not torch.cuda.is_current_stream_capturing():
        return False
    return x_ND.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x_ND.device)[0] not in (9, 10)


def _grouped_product(rows: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the e-th block of rows by weight[e]^T; `ends_E` holds where each block ends."""
    if fits_grouped(rows, weight):
        return Grouped.apply(rows, weight, ends_E)  # type: ignore[no-any-return,no-untyped-call]
    return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends_E)
