"""Where to compute, in which dtype, on how many threads."""

from __future__ import annotations

import ctypes
import os
import time
from functools import lru_cache

import torch

from step35.errors import ConfigError
from step35.runtime.machine import cpu_flags, physical_cores

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of glibc's mallopt."""


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA if there is one, else the CPU. Raises `ConfigError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r} is unknown; choose auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "choose device=cpu or auto, or install a CUDA build of torch."
        )
    return device


def dtype_name(dtype: str | torch.dtype | None) -> str:
    """Return what settings and files call a dtype; a name stays what it is."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it clearly faster than fp32, else float32.

    On CUDA it came with compute capability 8.0. CPU flags do not tell: with AMX, or AVX512-BF16 on some cores, bf16
    is several times faster than fp32, on others with the same flag it runs at 0.6 of fp32's rate. So a CPU that has
    a flag is measured.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type != "cpu" or not BF16_FLAGS & cpu_flags():
        return torch.float32
    return torch.bfloat16 if _bf16_speedup() > 1.2 else torch.float32


@lru_cache
def _bf16_speedup() -> float:
    """Return how many times faster this CPU multiplies bf16 matrices than fp32 ones (about 20 ms of work)."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(6):  # the best of several: the first ones warm up, and others may hold a core
            started = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def set_threads(count: int | None = None) -> int:
    """Let torch use `count` threads and return it; by default OMP_NUM_THREADS, else one per physical core."""
    if count is None:
        asked = os.environ.get("OMP_NUM_THREADS", "")
        count = int(asked) if asked.isdigit() else physical_cores()
    if count < 1:
        raise ConfigError(f"threads={count} must be at least 1; leave it out for one per physical core.")
    torch.set_num_threads(count)
    return count


def reuse_memory() -> None:
    """Let this process keep freed memory instead of returning it (glibc): a step allocates the same again.

    Fresh pages must be cleared by the system, a noticeable part of a training step on a CPU. The process holds its
    peak until it ends. Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
