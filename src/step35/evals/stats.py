"""Intervals for measured rates."""

from __future__ import annotations

import math


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval for a rate (95% by default); sound for rates near 0 and 1.

    `correct` need not be whole: with several samples a problem it is the sum of the problems' own rates.
    """
    if n == 0:
        return 0.0, 1.0
    rate = correct / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
