from __future__ import annotations

import pytest

from step35.evals.stats import wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe 1998, table I, method 3 (score interval without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (3, 7), (199, 200), (200, 200), (0, 200)])
def test_the_interval_is_symmetric_and_holds_the_rate(correct: int, n: int) -> None:
    low, high = wilson(correct, n)
    assert 0.0 <= low <= correct / n <= high + 1e-12 <= 1.0 + 1e-12
    mirrored = wilson(n - correct, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


def test_without_data_anything_is_possible() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_wider_confidence_is_a_wider_interval() -> None:
    assert wilson(3, 10, z=1.0)[0] > wilson(3, 10)[0] > wilson(3, 10, z=3.0)[0]
