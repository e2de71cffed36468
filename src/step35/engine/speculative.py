"""How deep to draft: as deep as the acceptance seen so far makes it worth while.

With a_k the share of right drafts at depth k (given that those before were right), a pass of depth d brings
1 + a_1 + a_1 a_2 + ... + a_1...a_d tokens and costs 1 + d * c trunk passes, c being the cost of a module and of one
more row to verify. Depth d is best where the quotient is largest. One pass in `PROBE_EVERY` goes one deeper, so
that a depth that has become worth while is found out.
"""

from __future__ import annotations

HALF_LIFE = 64
"""Drafts after which an observation counts half."""
PROBE_EVERY = 16


class DepthControl:
    """Running acceptance by depth over all requests, and the depth that it recommends."""

    def __init__(self, modules: int, *, draft_cost: float = 0.2) -> None:
        self.acceptance = [0.8] * modules
        self.draft_cost = draft_cost
        self._passes = 0

    def observe(self, drafted: int, right: int) -> None:
        """Take in one verification: `right` of `drafted` drafts were right, and the one behind them was not."""
        keep = 0.5 ** (1 / HALF_LIFE)
        for k in range(min(drafted, right + 1)):
            self.acceptance[k] = keep * self.acceptance[k] + (1 - keep) * (k < right)

    def choose(self) -> int:
        """Return the depth of the next pass."""
        self._passes += 1
        best = max(range(len(self.acceptance) + 1), key=self._speed)
        probe = self._passes % PROBE_EVERY == 0
        return min(best + probe, len(self.acceptance))

    def _speed(self, depth: int) -> float:
        tokens = chance = 1.0
        for accepted in self.acceptance[:depth]:
            chance *= accepted
            tokens += chance
        return tokens / (1 + depth * self.draft_cost)
