"""The experts' products by `grouped.cpp`: each block of rows with its own matrix."""

# R rows sorted by expert  E experts

from __future__ import annotations

from ctypes import Structure, byref, c_int, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from step35.model.compiled.library import MULTIPLE, fits, loaded


class CGrouped(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("experts", "outs", "ins")),
        ("ends", c_void_p),
        ("threads", c_int32),
        ("start", c_int32),
    )


def fits_grouped(rows: Tensor, weight: Tensor) -> bool:
    """Say whether `Grouped` multiplies such rows (R, ins) by such matrices (E, outs, ins)."""
    dtypes = weight.dtype in (rows.dtype, torch.float32) and weight.device.type == "cpu"
    return dtypes and weight.shape[1] % MULTIPLE == 0 and weight.is_contiguous() and fits(rows)


class Grouped(torch.autograd.Function):
    """rows (R, ins) times weight[e]^T (outs, ins), e as ends_E (int32) say: where each expert's rows end.

    Matrices may be fp32 where rows are bf16: their gradient is fp32 then.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
        rows = rows.contiguous()
        y = rows.new_empty(len(rows), weight.shape[1])
        _call("grouped_forward", rows, weight, ends_E, y)
        ctx.save_for_backward(rows, weight, ends_E)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, ends_E = ctx.saved_tensors
        needed = zip(ctx.needs_input_grad, (rows, weight), strict=False)
        grads = [torch.empty_like(x) if needs else None for needs, x in needed]
        _call("grouped_backward", rows, weight, ends_E, grad.contiguous(), *grads)
        return grads[0], grads[1], None


def add_product(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """Add grad^T rows to `total` (outs, ins), fp32, for grad (N, outs) and rows (N, ins) of one dtype, contiguous."""
    ends = torch.tensor([len(rows)], dtype=torch.int32)
    shape = CGrouped(1, *total.shape, ends.data_ptr(), torch.get_num_threads())
    pointers = [c_void_p(x.data_ptr()) for x in (rows, grad, total)]
    loaded().grouped.add_product(byref(shape), c_int(rows.dtype == torch.bfloat16), *pointers)


def _call(name: str, rows: Tensor, weight: Tensor, ends_E: Tensor, *others: Tensor | None) -> None:
    shape = CGrouped(*weight.shape, ends_E.data_ptr(), torch.get_num_threads())
    types = [c_int(x.dtype == torch.bfloat16) for x in (rows, weight)]
    pointers = [c_void_p(None if x is None else x.data_ptr()) for x in (rows, weight, *others)]
    getattr(loaded().grouped, name)(byref(shape), *types, *pointers)
