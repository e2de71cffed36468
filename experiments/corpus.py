"""Synthetic tokens drawn on the fly: Markov chains with a dominant bi-gram.

Token 0 ("A") is followed by token 1 ("B") always, and by nothing else; A is a stated share of all tokens. The other
tokens follow one chain for each domain, a row being of one domain. Common tokens are common successors (Zipf), and
common domains are common (Zipf), so that a router without balance has a reason to be uneven.
"""

# B rows  T tokens  V vocabulary  S successors

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from step35.data.packing import Batch

A, B = 0, 1
"""The bi-gram."""


@dataclass(frozen=True)
class Corpus:
    """A pure function of (seed, step)."""

    vocab: int = 256
    bigram_share: float = 0.0
    """Share of all tokens that are A, so also of all pairs of neighbours that are "A B"; below 0.5."""
    domains: int = 1
    successors: int = 8
    """Tokens that may follow a token within a domain, all equally likely."""
    seed: int = 0

    def batch(self, step: int, rows: int, context: int) -> Batch:
        """Return the rows of an update."""
        rng = np.random.default_rng([self.seed, 1, step])
        tables_DVS = self.tables()
        weights_D = 1.0 / np.arange(1, self.domains + 1)
        domain_B = rng.choice(self.domains, rows, p=weights_D / weights_D.sum())
        pick_TB = rng.integers(self.successors, size=(context, rows))
        starts_TB = rng.random((context, rows)) < self.bigram_share / (1 - self.bigram_share)  # never right after A
        tokens_BT = np.empty((rows, context), np.int64)
        current_B = rng.integers(2, self.vocab, rows)
        for t in range(context):
            after_B = tables_DVS[domain_B, current_B, pick_TB[t]]
            current_B = np.where(current_B == A, B, np.where(starts_TB[t], A, after_B))
            tokens_BT[:, t] = current_B
        return Batch(tokens_BT, np.zeros((rows, context), np.int32), np.ones((rows, context), bool))

    def tables(self) -> np.ndarray:
        """Return the successors of every token in every domain (D, V, S)."""
        rng = np.random.default_rng([self.seed, 0])
        weights_V = 1.0 / np.arange(1, self.vocab - 1)
        shape = (self.domains, self.vocab, self.successors)
        return rng.choice(np.arange(2, self.vocab), shape, p=weights_V / weights_V.sum())
