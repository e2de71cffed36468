"""Attention by `attention.cpp`: what `attention_kernels.attend` computes, with hidden keys left out, in one call."""

# B batch  T queries  S keys  H query heads  K kv heads  C head dim

from __future__ import annotations

from ctypes import Structure, byref, c_int, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from step35.model.compiled.library import loaded


class CShape(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "tokens", "keys", "heads", "kv_heads", "size")),
        ("first", c_void_p),
        ("last", c_void_p),
        ("threads", c_int32),
    )


class CHeads(Structure):
    _fields_ = (("data", c_void_p), *((name, c_int64) for name in ("batch_step", "token_step", "head_step")))


def attend_spans(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, first_BT: Tensor, last_BT: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v (B, T, H, C) over the keys at rows `first_BT` to `last_BT` of each query.

    Both are int32 and never fall within a row, and a query sees one key at least. bf16 is multiplied as such where the
    CPU can, and summed in fp32.
    """
    return AttendSpans.apply(q_BTHC, k_BSKC, v_BSKC, first_BT, last_BT)  # type: ignore[no-any-return,no-untyped-call]


class AttendSpans(torch.autograd.Function):
    """The forward pass keeps each query's log-sum-exp; the backward pass computes the scores again."""

    @staticmethod
    def forward(ctx: Any, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, first_BT: Tensor, last_BT: Tensor) -> Tensor:
        q, k, v = (_inner(x) for x in (q_BTHC, k_BSKC, v_BSKC))
        y_BTHC, sums_BHT = q.new_empty(q.shape), torch.empty(q.shape[0], q.shape[2], q.shape[1])
        _call("attend_forward", (q, k, v, y_BTHC), sums_BHT, first_BT, last_BT)
        ctx.save_for_backward(q, k, v, y_BTHC, sums_BHT, first_BT, last_BT)
        return y_BTHC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHC: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, y, sums_BHT, *spans = ctx.saved_tensors
        grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        _call("attend_backward", (q, k, v, y, _inner(grad_BTHC), *grads), sums_BHT, *spans)
        return *grads, None, None


def _call(name: str, heads: tuple[Tensor, ...], sums_BHT: Tensor, first_BT: Tensor, last_BT: Tensor) -> None:
    q, k = heads[:2]
    spans = first_BT.data_ptr(), last_BT.data_ptr()
    shape = CShape(*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:], *spans, torch.get_num_threads())
    views = (CHeads * len(heads))(*(CHeads(x.data_ptr(), *x.stride()[:3]) for x in heads))
    getattr(loaded().attention, name)(
        byref(shape), c_int(q.dtype == torch.bfloat16), views, c_void_p(sums_BHT.data_ptr())
    )


def _inner(x_BTHC: Tensor) -> Tensor:
    """Return x with a head's channels behind one another, copied where they are not."""
    return x_BTHC if x_BTHC.stride(-1) == 1 else x_BTHC.contiguous()
