"""The compiled kernels of this folder, and which tensors they take."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from step35.runtime.compiled import load_library

SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.cpp", "grouped.cpp", "pointwise.cpp"))
DTYPES = (torch.float32, torch.bfloat16)
MULTIPLE, MOST_HEAD = 16, 1024
"""Rows are read in vectors of at most this many elements; a head has at most so many channels."""


class Libraries(NamedTuple):
    attention: ctypes.CDLL
    grouped: ctypes.CDLL
    pointwise: ctypes.CDLL


@lru_cache
def libraries() -> Libraries | None:
    """Return the libraries; None where one cannot be built."""
    made = [load_library(source, "training") for source in SOURCES]
    return None if None in made else Libraries(*made)  # type: ignore[arg-type]


def fits(x: Tensor) -> bool:
    """Say whether the kernels take such rows: a plain tensor on the CPU, fp32 or bf16, some multiple of 16 wide."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in DTYPES
    return plain and x.shape[-1] % MULTIPLE == 0 and x.numel() > 0 and libraries() is not None


def loaded() -> Libraries:
    """Return the libraries, for callers that know that a tensor `fits`."""
    made = libraries()
    assert made is not None
    return made


def call(name: str, x: Tensor, *args: Any) -> None:
    """Call the pointwise kernel `name` in x's dtype, x first; tensors go as pointers, the number of threads last."""
    function = getattr(loaded().pointwise, f"{name}_{str(x.dtype).removeprefix('torch.')}")
    function(*map(_argument, (x, *args)), c_int(torch.get_num_threads()))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return c_void_p(value.data_ptr())
    return c_int64(value) if isinstance(value, int) else c_float(value) if isinstance(value, float) else value
