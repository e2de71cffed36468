"""Polar Express: the orthogonal factor of a matrix by minimax polynomials (arXiv:2505.16932; report section 4.1).

Each step applies p(X) = aX + b(XX^T)X + c(XX^T)^2 X, whose coefficients (`train/minimax.py`) make p the best odd
quintic approximation of 1 on the interval that then holds the singular values. Works on batches of matrices.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from step35.train.minimax import Quintic, minimax_chain

SAFETY = 1.01
"""Shrinks every polynomial but the last, so that rounding cannot push a singular value past its interval."""

SMALLEST = 1e-3
"""Singular values down to this share of the matrix's norm are brought to 1; smaller ones stay smaller."""


@lru_cache
def polynomials(steps: int, smallest: float = SMALLEST) -> tuple[Quintic, ...]:
    """Return the (a, b, c) to apply in turn, all but the last with the safety factor: p(x / 1.01)."""
    *first, last = minimax_chain(steps, smallest)
    return (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in first), last)


def polar_express(
    gradient: Tensor, *, steps: int = 6, smallest: float = SMALLEST, dtype: torch.dtype = torch.float16
) -> Tensor:
    """Return, in fp32, approximately U V^T for each gradient = U S V^T (..., rows, columns).

    State and intermediates (the results of the three products of a step) are rounded to `dtype`. CPUs multiply fp16
    about 80 times slower than bf16, so there the products run in fp32 and only their results are rounded, which is
    what CUDA does within a product.
    """
    tall = gradient.shape[-2] > gradient.shape[-1]
    wide = gradient.float().mT if tall else gradient.float()
    x = wide / (SAFETY * wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = iterate(x.flatten(0, -3) if x.ndim > 2 else x[None], polynomials(steps, smallest), dtype)
    return (x.view(wide.shape).mT if tall else x.view(wide.shape)).float()


def iterate(x: Tensor, quintics: tuple[Quintic, ...], dtype: torch.dtype) -> Tensor:
    """Apply the quintics in turn to x (n, rows, columns), rows <= columns; its singular values are at most 1."""
    native = x.device.type == "cuda" or dtype == torch.float32
    x = x.to(dtype) if native else x.to(dtype).float()

    def rounded(product: Tensor) -> Tensor:
        return product if native else product.copy_(product.to(dtype))  # in place: fresh memory costs as much again

    for a, b, c in quintics:
        gram = rounded(torch.bmm(x, x.mT))
        inner = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        x = rounded(torch.baddbmm(x, inner, x, beta=a))
    return x
