"""What lies between matrix products as one call each, forward and backward: the same sums as the torch code beside
which they stand in `norm.py`, `attention.py`, `mlp.py` and `experts.py`, in fp32 and rounded once.
"""

# N rows  D columns  B batch  T tokens  H query heads  K kv heads, or experts of a token  C head dim  I expert hidden
# R routed rows

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from step35.model.compiled.library import call, fits

CHUNK = 128
"""Rows whose gradients of a weight are summed together, as in `pointwise.cpp`."""


def _chunks(rows: int, *shape: int) -> Tensor:
    return torch.zeros(-(-rows // CHUNK), *shape)


def squares(x_RD: Tensor) -> Tensor:
    """Return the sum of each row's squares (R,), fp32, without gradient."""
    if not fits(x_RD):
        return torch.linalg.vector_norm(x_RD, dim=-1, dtype=torch.float32).square()
    y_R = torch.empty(len(x_RD))
    call("squares", x_RD.contiguous(), *x_RD.shape, y_R)
    return y_R


class Norm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension; weight (D,) fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        call("norm", x, weight_D, x.numel() // x.shape[-1], x.shape[-1], eps, y)
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D = ctx.saved_tensors
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        grad_x, sums = torch.empty_like(x), _chunks(rows, size)
        call("norm_grad", x, weight_D, grad.contiguous(), rows, size, ctx.eps, grad_x, sums)
        return grad_x, sums.sum(0), None


class NormTurn(torch.autograd.Function):
    """Queries and keys normed and rotated, from heads (B, T, H + 2 K, C) that hold the values behind them.

    Weights (C,) are fp32, cos and sin (B, T, 1, r/2) of the heads' dtype. Returns (B, T, H, C) and (B, T, K, C) and,
    as they are, the values.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, queries: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        keys = (x.shape[2] - queries) // 2
        y = x.new_empty(*x.shape[:2], queries + keys, x.shape[3])
        shape = x.shape[0] * x.shape[1], queries, keys, x.shape[3], cos.shape[-1], eps
        call("turned", x, weight_q, weight_k, cos, sin, *shape, y)
        ctx.save_for_backward(x, weight_q, weight_k, cos, sin)
        ctx.shape = shape
        return y[:, :, :queries], y[:, :, queries:], x[:, :, queries + keys :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_q, weight_k, cos, sin = ctx.saved_tensors
        grad_x, sums = torch.empty_like(x), _chunks(ctx.shape[0], 2, x.shape[3])
        parts = [grad.contiguous() for grad in grads]
        call("turned_grad", x, weight_q, weight_k, cos, sin, *ctx.shape, *parts, grad_x, sums)
        return grad_x, *sums.sum(0), None, None, None, None


class Gate(torch.autograd.Function):
    """x (..., H, C) times the sigmoid of z (..., H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor) -> Tensor:
        x, z = x.contiguous(), z.contiguous()
        y = torch.empty_like(x)
        call("gated", x, z, z.numel(), x.shape[-1], y)
        ctx.save_for_backward(x, z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, z = ctx.saved_tensors
        grad_x, grad_z = torch.empty_like(x), torch.empty_like(z)
        call("gated_grad", x, z, grad.contiguous(), z.numel(), x.shape[-1], grad_x, grad_z)
        return grad_x, grad_z


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up with its clips, gate and up packed in the last dimension of x (..., 2 I)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: float) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        call("swiglu", x, y.numel() // y.shape[-1], y.shape[-1], float(clip), y)
        ctx.save_for_backward(x)
        ctx.clip = float(clip)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        call("swiglu_grad", x, grad, grad.numel() // grad.shape[-1], grad.shape[-1], ctx.clip, grad_x)
        return grad_x, None


class Dispatch(torch.autograd.Function):
    """Row token_R[r] of x (N, D) for each routed row r; place_NK says where a token's rows lie."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_R: Tensor, place_NK: Tensor) -> Tensor:
        x_ND = x_ND.contiguous()
        y_RD = x_ND.new_empty(len(token_R), x_ND.shape[1])
        call("gather", x_ND, token_R, *y_RD.shape, y_RD)
        ctx.save_for_backward(place_NK)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (place_NK,) = ctx.saved_tensors
        grad_ND = grad_RD.new_empty(len(place_NK), grad_RD.shape[1])
        call("gather_sum", grad_RD.contiguous(), place_NK, None, *place_NK.shape, grad_RD.shape[1], grad_ND)
        return grad_ND, None, None


class Combine(torch.autograd.Function):
    """The sum over a token's rows, at place_NK of x (R, D), by their weights (N, K) in fp32."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weights_NK: Tensor, place_NK: Tensor) -> Tensor:
        x_RD, weights_NK = x_RD.contiguous(), weights_NK.contiguous()
        y_ND = x_RD.new_empty(len(place_NK), x_RD.shape[1])
        call("gather_sum", x_RD, place_NK, weights_NK, *place_NK.shape, x_RD.shape[1], y_ND)
        ctx.save_for_backward(x_RD, weights_NK, place_NK)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RD, weights_NK, place_NK = ctx.saved_tensors
        grad_RD, grad_weights = torch.empty_like(x_RD), torch.empty_like(weights_NK)
        args = place_NK, weights_NK, grad_ND.contiguous(), *place_NK.shape, x_RD.shape[1], grad_RD, grad_weights
        call("gather_sum_grad", x_RD, *args)
        return grad_RD, grad_weights, None
