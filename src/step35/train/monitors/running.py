"""A running mean and deviation of one figure, which spikes are held against."""

from __future__ import annotations

import math
from typing import Any

FEW = 20
"""Values before a deviation is worth dividing by."""
LEAST_DEVIATION = 0.01
"""Least standard deviation, as a share of the mean: without it a flat curve makes a spike of its noise."""


class Running:
    """mean <- mean + (x - mean) / w and the variance likewise, with w = min(values so far, window)."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def z_score(self, value: float) -> float:
        """Return (value - mean) / deviation of the values before this one; 0 while there are few, or for no number."""
        if self.count < FEW or not math.isfinite(value):
            return 0.0
        return (value - self.mean) / self._deviation()

    def ratio(self, value: float) -> float:
        """Return value / mean of the values before this one; 1 while there are few, or for no number."""
        if self.count < FEW or not math.isfinite(value) or self.mean == 0:
            return 1.0
        return value / self.mean

    def add(self, value: float, *, bound: float = 4.0) -> None:
        """Take in `value`, at most `bound` deviations from the mean: one spike must not hide the next."""
        if not math.isfinite(value):
            return
        if self.count >= FEW:
            reach = bound * self._deviation()
            value = min(max(value, self.mean - reach), self.mean + reach)
        self.count += 1
        share = 1 / min(self.count, self.window)
        gap = value - self.mean
        self.mean += share * gap
        self.variance = (1 - share) * (self.variance + share * gap * gap)

    def _deviation(self) -> float:
        return max(math.sqrt(self.variance), LEAST_DEVIATION * abs(self.mean), 1e-12)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.count, self.mean, self.variance = state["count"], state["mean"], state["variance"]
