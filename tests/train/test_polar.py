from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step35.train.minimax import minimax_chain
from step35.train.polar import SAFETY, polar_express, polynomials


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
    for step, (a, b, c) in enumerate(minimax_chain(6)):
        shrink = 1.01 if step < 5 else 1.0
        values = [a * (x / shrink) + b * (x / shrink) ** 3 + c * (x / shrink) ** 5 for x in values]
    ours = polar_express(torch.diag(torch.tensor(diagonal)), dtype=torch.float32)
    torch.testing.assert_close(ours, torch.diag(torch.tensor(values)), rtol=1e-4, atol=1e-5)


def test_every_polynomial_but_the_last_is_shrunk() -> None:
    assert SAFETY == 1.01
    for steps in (1, 6, 8):
        chain, chosen = minimax_chain(steps), polynomials(steps)
        assert chosen[-1] == chain[-1]
        for ours, (a, b, c) in zip(chosen[:-1], chain, strict=False):
            assert ours == pytest.approx((a / 1.01, b / 1.01**3, c / 1.01**5), rel=1e-15)


@pytest.mark.parametrize(("steps", "smallest"), [(4, 0.05), (8, 1e-4)])
def test_any_number_of_steps_and_any_interval(steps: int, smallest: float) -> None:
    gradient, exact = matrix(torch.logspace(torch.tensor(3 * smallest).log10().item(), 0, 8), 8, 8)
    ours = polar_express(gradient, steps=steps, smallest=smallest, dtype=torch.float32)
    assert (ours - exact).abs().max() < 0.01
    # The default interval is too narrow for the second matrix, and takes more than 4 steps for the first.
    assert (polar_express(gradient, steps=min(steps, 6), dtype=torch.float32) - exact).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_equals_a_plain_loop(dtype: torch.dtype) -> None:
    gradient, _ = matrix(torch.logspace(-3, 0, 12), 12, 20)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    x = rounded(gradient / (1.01 * gradient.norm() + 1e-7))
    for a, b, c in polynomials(6):
        gram = rounded(x @ x.T)
        x = rounded(a * x + rounded(b * gram + c * gram @ gram) @ x)
    # Products in fp32 can round the other way where fp64 lies at a tie: one place of `dtype`, amplified by the steps.
    assert (polar_express(gradient, dtype=dtype) - x).abs().max() < max(8 * torch.finfo(dtype).eps, 1e-5)


def test_a_matrix_gets_the_same_bits_alone_and_in_a_batch() -> None:
    batch = torch.randn(7, 24, 40, generator=torch.Generator().manual_seed(0))
    together = polar_express(batch.unflatten(0, (7, 1)))
    assert together.shape == (7, 1, 24, 40)
    for alone, ours in zip(batch, together, strict=True):
        assert torch.equal(polar_express(alone), ours[0])
