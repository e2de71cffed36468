"""Polar Express: the orthogonal factor of a matrix by minimax polynomials (arXiv:2505.16932; report section 4.1).

Each step applies p(X) = aX + b(XX^T)X + c(XX^T)^2 X, whose coefficients make p the best odd quintic approximation
of 1 on the interval that then holds the singular values. Works on a batch of matrices (..., rows, columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Published coefficients for singular values in [1e-3, 1], before the safety factor."""

SAFETY = 1.01
"""Shrinks every polynomial but the last, so that rounding cannot push a singular value past its interval."""


def polynomials(steps: int) -> list[tuple[float, float, float]]:
    """Return the (a, b, c) to apply in turn."""
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in COEFFICIENTS[: steps - 1]]
    return [*safe, COEFFICIENTS[steps - 1]]


def polar_express(gradient: Tensor, *, steps: int = 6, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return, in fp32, approximately U V^T for each gradient = U S V^T (..., rows, columns).

    State and intermediates are rounded to `dtype`. CPUs multiply fp16 about 80 times slower than bf16, so there the
    products run in fp32 and only their results are rounded; CUDA computes in `dtype` throughout.
    """
    tall = gradient.shape[-2] > gradient.shape[-1]
    x = gradient.float()
    if tall:
        x = x.mT
    x = x / (SAFETY * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    native = x.device.type == "cuda" or dtype == torch.float32

    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype) if native else value.to(dtype).float()

    x = rounded(x)
    for a, b, c in polynomials(steps):
        gram = rounded(x @ x.mT)
        x = rounded(a * x + rounded(b * gram + c * rounded(gram @ gram)) @ x)
    return (x.mT if tall else x).float()
