"""Devices by name: peak rates, memory and interconnect, for the roofline of `config/roofline.py`.

From the vendor's data sheets, dense (half of what a sheet states with sparsity); bytes are decimal. The latency of a
collective is on no data sheet: `COLLECTIVE_S` is our assumption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from step35.config.base import suggest
from step35.errors import ConfigError

Format = Literal["float32", "bfloat16", "float8"]
BYTES: dict[Format, int] = {"float32": 4, "bfloat16": 2, "float8": 1}
COLLECTIVE_S = 5e-6
"""Seconds of a small all-reduce over the GPUs of one NVLink node at best, in a captured graph; one hop each way."""


@dataclass(frozen=True)
class Hardware:
    """One device of a node, and its link to the others."""

    name: str
    flops: dict[Format, float]
    """Peak FLOP/s of dense matrix products by weight format; on GPUs float32 means TF32."""
    bandwidth: float
    """Bytes/s read from memory."""
    memory_bytes: float
    link: float
    """Bytes/s that one device sends to the others (half of a sheet's bidirectional figure); 0 when it is alone."""
    source: str


HOPPER_FLOPS: dict[Format, float] = {"float32": 494.5e12, "bfloat16": 989e12, "float8": 1979e12}
DEVICES = {
    device.name: device
    for device in (
        Hardware(
            "a100",
            {"float32": 156e12, "bfloat16": 312e12, "float8": 312e12},
            2.039e12, 80e9, 300e9, "NVIDIA A100 80GB SXM data sheet; no FP8 units, so float8 weights multiply as bf16",
        ),
        Hardware(
            "h100",
            HOPPER_FLOPS,
            3.35e12, 80e9, 450e9, "NVIDIA H100 SXM data sheet",
        ),
        Hardware(
            "h800",
            HOPPER_FLOPS,
            3.35e12, 80e9, 200e9, "NVIDIA H800 SXM: the H100 with 400 GB/s of NVLink",
        ),
        Hardware(
            "h200",
            HOPPER_FLOPS,
            4.8e12, 141e9, 450e9, "NVIDIA H200 SXM data sheet",
        ),
        Hardware(
            "b200",
            {"float32": 1.1e15, "bfloat16": 2.25e15, "float8": 4.5e15},
            7.7e12, 180e9, 900e9, "NVIDIA HGX B200 data sheet",
        ),
    )
}  # fmt: skip
HOPPER = ("h100", "h800", "h200")


def device(name: str) -> Hardware:
    """Return the device called `name`; raise `ConfigError` with the known names if there is none."""
    if name not in DEVICES:
        known = ", ".join([*DEVICES, "cpu"])
        raise ConfigError(f"hardware={name!r} is unknown.{suggest(name, [*DEVICES, 'cpu'])} Choose from: {known}.")
    return DEVICES[name]
