from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.errors import ConfigError
from step35.train.minimax import CUSHION, Quintic, minimax_chain, minimax_quintic, value

PUBLISHED = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""As printed in arXiv:2505.16932, for singular values in [1e-3, 1], before the safety factor."""


def worst(quintic: Quintic, low: float, high: float, points: int = 20_001) -> float:
    """Return max |1 - p(x)| over a dense grid."""
    x = np.linspace(low, high, points)
    a, b, c = quintic
    return float(np.abs(1 - (a * x + b * x**3 + c * x**5)).max())


def test_the_chain_is_the_published_one() -> None:
    chain = minimax_chain(8)
    for ours, published in zip(chain, PUBLISHED, strict=True):
        assert ours == pytest.approx(published, rel=1e-6, abs=0)
        assert ours == pytest.approx(published, rel=0, abs=1e-6)
    # Only the seventh, nearly degenerate one, differs beyond rounding: by the digits its linear system had lost.
    for number in (0, 1, 2, 3, 4, 5, 7):
        assert chain[number] == pytest.approx(PUBLISHED[number], rel=2e-15)
    assert minimax_chain(40)[-1] == pytest.approx((1.875, -1.25, 0.375), rel=1e-14)


@given(st.floats(-8, 0), st.floats(0.01, 100))
@settings(max_examples=200, deadline=None)
def test_the_error_alternates_at_four_points(exponent: float, high: float) -> None:
    """Chebyshev's theorem: an odd quintic with equal errors of alternating sign at four points is the best one."""
    low = high * 10**exponent
    a, b, c = quintic = minimax_quintic(low, high)
    inner = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).astype(complex)).real)  # where the derivative vanishes
    errors = [1 - value(quintic, x) for x in (low, *inner, high)]
    largest = max(map(abs, errors))
    assert worst(quintic, low, high) <= largest + 1e-12
    if low < 0.9 * high:  # closer together the errors are below what a double holds next to 1
        assert low < inner[0] < inner[1] < high
        assert errors == pytest.approx([largest, -largest, largest, -largest], rel=1e-6, abs=1e-13)


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1.0), (CUSHION, 1.0), (0.2, 1.8), (0.5, 1.5), (0.9, 1.1)])
def test_no_odd_quintic_nearby_does_better(low: float, high: float) -> None:
    best = minimax_quintic(low, high)
    error = worst(best, low, high)
    for size in (1e-1, 1e-2, 1e-3, 1e-4):
        for signs in itertools.product((-1, 0, 1), repeat=3):
            nearby = tuple(k * (1 + size * sign) for k, sign in zip(best, signs, strict=True))
            assert worst(nearby, low, high) >= error - 1e-7, (size, signs)  # type: ignore[arg-type]


def test_no_odd_quintic_in_a_random_direction_does_better() -> None:
    low, high = 0.05, 1.0
    best = np.array(minimax_quintic(low, high))
    error = worst(tuple(best), low, high)
    x = np.linspace(low, high, 2001)
    basis = np.stack([x, x**3, x**5], axis=1)
    random = np.random.default_rng(0)
    axes, _ = np.linalg.qr(basis)  # directions independent as functions: those of the coefficients are nearly parallel
    for direction in random.normal(size=(2000, 3)):
        step, *_ = np.linalg.lstsq(basis, axes @ direction, rcond=None)
        for size in (1e-1, 1e-2, 1e-3):
            assert np.abs(1 - basis @ (best + size * step)).max() >= error - 1e-7


@pytest.mark.parametrize("smallest", [1e-6, 1e-3, 0.02, 0.3])
def test_a_chain_maps_its_interval_towards_one(smallest: float) -> None:
    low, high = smallest, 1.0
    for a, b, c in minimax_chain(10, smallest):
        x = np.linspace(low, high, 5001)
        y = x * (a + x**2 * (b + x**2 * c))
        low, high = value((a, b, c), low), 2 - value((a, b, c), low)
        assert y[-1] == pytest.approx(high, abs=1e-12)
        assert (y.min(), y.max()) == pytest.approx((low, high), abs=1e-12)
        assert low >= x[0] - 1e-12
    if smallest >= 1e-3:
        assert low == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("steps", "smallest"), [(0, 1e-3), (6, 0.0), (6, 1.0), (6, -0.1)])
def test_settings_out_of_range_are_refused(steps: int, smallest: float) -> None:
    with pytest.raises(ConfigError, match=f"steps={steps}, smallest={smallest}"):
        minimax_chain(steps, smallest)
