"""How fast this machine reads, and how fast it could decode if reading were all there is to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from step35.config.cost import cost
from step35.config.model import ModelConfig

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "q8_0": 34 / 32}
"""Bytes of a weight; scales count for Q8_0, where they are every 32 weights. Norms and routers count like the rest."""


def read_bandwidth(size_bytes: int, repeats: int = 8) -> tuple[float, str]:
    """Return the bytes/s of the fastest way found here to read `size_bytes` with torch's threads, and its name.

    Small sizes are read several times over without a pause, so that a timing lasts long enough; what fits the caches
    then comes from there.
    """
    floats = torch.ones(size_bytes // 4 // 4096 * 4096)  # ones, since untouched zeros are one shared page of memory
    doubles, matrix, vector = floats.view(torch.float64), floats.view(-1, 4096), torch.ones(4096)
    readers: dict[str, Callable[[], object]] = {
        "sum of fp32": floats.sum,
        "sum of fp64": doubles.sum,
        "fp32 matrix times vector": lambda: matrix @ vector,
    }
    passes = max(1, (1 << 28) // floats.nbytes)
    best = {name: max(_rate(reader, floats.nbytes, passes) for _ in range(repeats)) for name, reader in readers.items()}
    name = max(best, key=lambda reader: best[reader])
    return best[name], name


def _rate(reader: Callable[[], object], size: int, passes: int) -> float:
    started = time.perf_counter()
    for _ in range(passes):
        reader()
    return size * passes / (time.perf_counter() - started)


def decode_bytes(config: ModelConfig, context: int, weights: str, cache: str) -> int:
    """Return the bytes that decoding one token reads: the active weights with the head, keys and values."""
    return cost(config, context, weight_bytes=WEIGHT_BYTES[weights], cache_bytes=WEIGHT_BYTES[cache]).read_bytes


def last_cache_bytes() -> int | None:
    """Return the size of the first core's largest cache; None where the system does not tell."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=None)
