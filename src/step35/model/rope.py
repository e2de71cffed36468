"""Rotary position embedding: half-split pairs, partial in full layers, optional llama3 frequency scaling.

Pairs are (j, j + r/2) inside the first r = `rotary_dim` channels of a head; the rest passes through.
Angles are computed in fp32 and cast to the model dtype, as the released model's engines do.
"""

# B batch  T tokens  H heads  C head dim  r rotary dim

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from step35.config.model import LayerConfig, RopeScaling


def inverse_frequencies(layer: LayerConfig) -> Tensor:
    """Return the r/2 inverse frequencies of `layer` (fp32): theta^(-2j/r), scaled where the layer asks for it."""
    exponents = torch.arange(0, layer.rotary_dim, 2, dtype=torch.float32) / layer.rotary_dim
    frequencies = 1.0 / layer.rope_theta**exponents
    return scale_llama3(frequencies, layer.rope_scaling) if layer.rope_scaling else frequencies


def scale_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow down long wavelengths by `factor`, keep short ones, and blend linearly in between."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return blend * frequencies + (1.0 - blend) * frequencies / scaling.factor


def rope_table(layer: LayerConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (B, T, 1, r/2), for the given positions."""
    angles = positions_BT[..., None, None].float() * _frequencies_on(positions_BT.device, layer)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@cache
@torch.inference_mode(False)
def _frequencies_on(device: torch.device, layer: LayerConfig) -> Tensor:
    """Return `inverse_frequencies` on the device, copied once and kept: CUDA graphs read them where they lie."""
    return inverse_frequencies(layer).to(device)


def rotate(x_BTHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] channels of each head."""
    half = cos.shape[-1]
    first, second, rest = x_BTHC.split([half, half, x_BTHC.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
