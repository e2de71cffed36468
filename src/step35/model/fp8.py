"""Block-quantised FP8 weights: one fp32 scale for each 128 x 128 block, as the FP8 release stores them.

`name.weight` holds e4m3 numbers and `name.weight_scale_inv` the scales, (..., ceil(R/128), ceil(C/128)) for a matrix
(..., R, C): weight = number * scale. Experts, attention projections and FFNs are quantised; embeddings, heads, norms,
gates, the MTP modules' joint projection and the router are not.
"""

# R rows  C columns

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step35.errors import CheckpointError, ConfigError

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
FP8 = torch.float8_e4m3fn

_QUANTISED = (
    *(f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")),
    *(f".{part}.{name}_proj.weight" for part in ("mlp", "moe", "share_expert") for name in ("gate", "up", "down")),
)


def is_quantised(released: str) -> bool:
    """Say whether the FP8 format stores the released tensor `released` in FP8."""
    return released.endswith(_QUANTISED)


def scale_shape(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix of `shape` (..., R, C)."""
    return (*shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block))


def quantise(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return e4m3 numbers of `weight` (..., R, C) and fp32 scales; each block's largest number becomes 448.

    A number's relative error is at most 1/16 (three bits of mantissa) unless it is below 2^-15 of its block's largest.
    """
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))  # (..., rows/b, b, columns/b, b)
    largest = blocks.abs().amax(dim=(-3, -1))
    if not largest.isfinite().all():
        raise CheckpointError("a weight is infinite or not a number, which FP8 blocks cannot hold; write bfloat16.")
    scale = torch.where(largest > 0, largest / torch.finfo(FP8).max, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (blocks / scale[..., None, :, None]).flatten(-4, -3).flatten(-2)
    return numbers[..., :rows, :columns].to(FP8).contiguous(), scale


def dequantise_into(out: Tensor, numbers: Tensor, scale: Tensor, block: int = BLOCK) -> None:
    """Write numbers * scale (..., R, C) into `out`, rounded once, holding a band of rows at a time."""
    if numbers.ndim > 2:
        for one_out, one_numbers, one_scale in zip(out, numbers, scale, strict=True):
            dequantise_into(one_out, one_numbers, one_scale, block)
        return
    for i, band in enumerate(numbers.split(block)):
        columns = scale[i].float().repeat_interleave(block)[: band.shape[1]]
        out.narrow(0, i * block, len(band)).copy_(band.float().mul_(columns))


def dequantise(numbers: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """Return the fp32 weights (..., R, C)."""
    out = torch.empty(numbers.shape, dtype=torch.float32)
    dequantise_into(out, numbers, scale, block)
    return out


def quantisation_config(names: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint with the released tensors `names`: what engines need to read."""
    kept = sorted(
        {name.removesuffix(".weight") for name in names if name.endswith(".weight") and not is_quantised(name)}
    )
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [name for name in kept if "norm" not in name],
    }


def block_of(config: dict[str, Any] | None) -> int:
    """Return the block size that a `quantization_config` declares; refuse other formats with `ConfigError`."""
    if not config:
        return BLOCK
    if not isinstance(config, dict):
        raise ConfigError(f"config.json: quantization_config={config!r} is not a table of settings; fetch it again.")
    block = config.get("weight_block_size")
    square = isinstance(block, list) and len(block) == 2 and block[0] == block[1] and block[0] > 0
    if config.get("quant_method") != "fp8" or not square:
        raise ConfigError(
            f"config.json: quantization_config has quant_method={config.get('quant_method')!r} and "
            f"weight_block_size={block!r}; only 'fp8' in square blocks such as [128, 128] is read. "
            "Use the bf16 or the FP8 release."
        )
    return int(block[0])
