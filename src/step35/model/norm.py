"""Zero-centred RMSNorm (section 2): the weight is stored around 0 and applied as 1 + w, in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step35.model.compiled.library import fits
from step35.model.compiled.pointwise import Norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + w) over the last dimension, computed in fp32, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm the last dimension of x (..., H, C) or (..., C); `weight` is (C,), or (H, C) with one row a head."""
    if weight.ndim == 1 and fits(x):
        return Norm.apply(x, 1.0 + weight.float(), eps)  # type: ignore[no-any-return,no-untyped-call]
    normed = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    return (normed * (1.0 + weight.float())).to(x.dtype)
