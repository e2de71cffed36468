from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step35.train.polar import COEFFICIENTS, SAFETY, polar_express, polynomials


def matrix(singular: Tensor, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a matrix with the given singular values, and its orthogonal factor U V^T."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0][:, : len(singular)]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0][:, : len(singular)]
    return ((u * singular.double()) @ v.T).float(), (u @ v.T).float()


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (12, 40), (40, 12)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_six_steps_orthogonalise_a_well_conditioned_matrix(rows: int, columns: int, scale: float) -> None:
    gradient, exact = matrix(torch.linspace(0.1, 1, min(rows, columns)) * scale, rows, columns)
    ours = polar_express(gradient, dtype=torch.float32)
    assert ours.shape == gradient.shape
    assert (torch.linalg.svdvals(ours) - 1).abs().max() < 2e-3
    assert (ours - exact).abs().max() < 2e-3
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    assert (ours - u @ vh).abs().max() < 2e-3


def test_eight_steps_reach_singular_values_a_thousand_times_smaller() -> None:
    gradient, exact = matrix(torch.logspace(-2.5, 0, 8), 8, 8)
    assert (polar_express(gradient, steps=8, dtype=torch.float32) - exact).abs().max() < 5e-3


def test_more_steps_come_closer() -> None:
    gradient, _ = matrix(torch.linspace(0.05, 1, 16), 16, 32)
    errors = [
        (torch.linalg.svdvals(polar_express(gradient, steps=steps, dtype=torch.float32)) - 1).abs().max().item()
        for steps in (2, 4, 6)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1


def test_a_tall_matrix_is_its_transpose_turned_back() -> None:
    gradient, _ = matrix(torch.linspace(0.1, 1, 12), 12, 40)
    assert torch.equal(polar_express(gradient.T), polar_express(gradient).T)


def test_each_matrix_of_a_batch_is_normalised_on_its_own() -> None:
    single = [matrix(torch.linspace(0.1, 1, 8), 8, 12, seed=seed)[0] * 100.0**seed for seed in range(3)]
    batch = polar_express(torch.stack(single))
    for ours, gradient in zip(batch, single, strict=True):
        torch.testing.assert_close(ours, polar_express(gradient), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_differs_from_fp32_but_stays_close(dtype: torch.dtype) -> None:
    gradient, exact = matrix(torch.linspace(0.1, 1, 16), 16, 32)
    rounded, full = polar_express(gradient, dtype=dtype), polar_express(gradient, dtype=torch.float32)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.to(dtype).float())  # every entry is a number of that dtype
    error = (rounded - full).abs().max().item()
    assert 0 < error < (0.01 if dtype == torch.float16 else 0.1)
    assert (rounded - exact).abs().max() < (0.01 if dtype == torch.float16 else 0.1)


def test_fp16_is_the_default() -> None:
    gradient, _ = matrix(torch.linspace(0.1, 1, 16), 16, 32)
    assert torch.equal(polar_express(gradient), polar_express(gradient, steps=6, dtype=torch.float16))


def test_a_zero_gradient_gives_a_zero_update() -> None:
    assert torch.equal(polar_express(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_singular_values_follow_the_scalar_polynomials() -> None:
    # On a diagonal matrix each step is a x + b x^3 + c x^5 of each entry.
    diagonal = [1.0, 0.7, 0.2, 0.03]
    norm = sum(x * x for x in diagonal) ** 0.5
    values = [x / (1.01 * norm) for x in diagonal]
    for step, (a, b, c) in enumerate(COEFFICIENTS[:6]):
        shrink = 1.01 if step < 5 else 1.0
        values = [a * (x / shrink) + b * (x / shrink) ** 3 + c * (x / shrink) ** 5 for x in values]
    ours = polar_express(torch.diag(torch.tensor(diagonal)), dtype=torch.float32)
    torch.testing.assert_close(ours, torch.diag(torch.tensor(values)), rtol=1e-4, atol=1e-5)


def test_every_polynomial_but_the_last_is_shrunk() -> None:
    assert SAFETY == 1.01
    for steps in (1, 6, 8):
        chosen = polynomials(steps)
        assert len(chosen) == steps
        assert chosen[-1] == COEFFICIENTS[steps - 1]
        for (a, b, c), published in zip(chosen[:-1], COEFFICIENTS, strict=False):
            x = 0.8
            a0, b0, c0 = published
            expected = a0 * (x / 1.01) + b0 * (x / 1.01) ** 3 + c0 * (x / 1.01) ** 5
            assert a * x + b * x**3 + c * x**5 == pytest.approx(expected)


def test_the_published_coefficients_are_centred_on_one() -> None:
    """The construction puts p(l) and p(u) equally far from 1 on each step's interval [l, u], from [1e-3, 1] on.

    A wrong digit breaks the chain. The last polynomial is its fixed point: p(1) = 1, p'(1) = p''(1) = 0.
    """
    low, high = 1e-3, 1.0
    for a, b, c in COEFFICIENTS:
        at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
        assert at_low + at_high == pytest.approx(2.0, abs=1e-6)
        low, high = min(at_low, at_high), max(at_low, at_high)
    assert low == pytest.approx(1.0, abs=1e-6)
    a, b, c = COEFFICIENTS[-1]
    assert (a + b + c, a + 3 * b + 5 * c, 6 * b + 20 * c) == (1.0, 0.0, 0.0)
