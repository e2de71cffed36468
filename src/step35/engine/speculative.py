"""How deep to draft: as deep as the acceptance and the times seen so far make worth while.

With a_k the share of right drafts at depth k (given that those before were right), a pass of depth d brings each
request 1 + a_1 + a_1 a_2 + ... + a_1...a_d tokens. What it costs depends on the model, on the machine and, most of
all, on how many requests decode together: where a pass of one request waits for weights, rows to verify are nearly
free; where many requests keep the processor busy, a draft costs as much as a token. So passes are timed, by depth and
by the number of requests, and depth d is best where tokens over seconds is largest. Times decide about speed only:
the output is the same at any depth.
"""

from __future__ import annotations

from collections import defaultdict, deque

HALF_LIFE = 64
"""Drafts after which an observation counts half."""
TRIALS = 3
"""Passes of each depth before times decide."""
RECENT = 7
"""Times to keep of each depth; the shortest decides, since whatever else the machine does makes passes longer."""
PROBE_EVERY = 16
"""One pass in so many goes one deeper or shallower, so that a depth that has become worth while is found out."""


class DepthControl:
    """Running acceptance by depth over all requests, the times of passes, and the depth that they recommend."""

    def __init__(self, modules: int) -> None:
        self.acceptance = [0.8] * modules
        self._seen = [0] * modules
        self._seconds: defaultdict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._passes = 0

    def observe(self, drafted: int, right: int) -> None:
        """Take in one verification: `right` of `drafted` drafts were right, and the one behind them was not."""
        for k in range(min(drafted, right + 1)):
            self._seen[k] += 1
            weight = max(1 / (1 + self._seen[k]), 1 - 0.5 ** (1 / HALF_LIFE))  # at first, the mean of all
            self.acceptance[k] += weight * ((k < right) - self.acceptance[k])

    def time(self, requests: int, depth: int, seconds: float) -> None:
        """Take in how long a pass took in which so many requests decoded, none deeper than `depth`."""
        self._seconds[_load(requests), depth].append(seconds)

    def choose(self, requests: int, most: int) -> int:
        """Return the depth, 0 to `most`, of the next pass, in which so many requests decode."""
        load = _load(requests)
        for depth in range(most, -1, -1):
            if len(self._seconds[load, depth]) < TRIALS:
                return depth
        best = max(range(most + 1), key=lambda depth: self._tokens(depth) / min(self._seconds[load, depth]))
        self._passes += 1
        if self._passes % PROBE_EVERY:
            return best
        deeper = self._passes // PROBE_EVERY % 2
        return min(best + 1, most) if deeper else max(best - 1, 0)

    def _tokens(self, depth: int) -> float:
        tokens = chance = 1.0
        for accepted in self.acceptance[:depth]:
            chance *= accepted
            tokens += chance
        return tokens


def _load(requests: int) -> int:
    """Return what passes of about so many requests have in common: the power of two."""
    return requests.bit_length()
