"""One source as an endless stream of documents, permuted anew each epoch; any part of it can be read at once.

The permutation of an epoch depends on (seed, source, epoch) alone, so what stands at a position of the stream does
too. An epoch's order is kept in memory: 16 bytes a document.
"""
# D documents of the source  P pieces

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from step35.data.shards import TokenShards
from step35.errors import DataError

Array = np.ndarray[Any, Any]


def random_stream(seed: int, purpose: str, number: int) -> np.random.Generator:
    """Return a generator that depends on these three and nothing else."""
    return np.random.default_rng((seed, number, *purpose.encode()))


@dataclass(frozen=True)
class Pieces:
    """Runs of tokens, each within one document, in order of the stream; arrays of one shape (P,), int64."""

    starts: Array
    """Place of the first token in the shards."""
    lengths: Array
    """Tokens of the piece."""
    offsets: Array
    """Tokens of the document before the piece; 0 where a document begins."""
    documents: Array
    """Number of the document in the shards."""


class SourceStream:
    """The documents of `shards` in a new order each epoch; position p of the stream is in epoch p // tokens."""

    def __init__(self, name: str, shards: TokenShards, seed: int) -> None:
        """Raise `DataError` when the source is empty."""
        if not shards.total_tokens:
            raise DataError(f"source {name!r} ({shards.folder}) holds no tokens; leave it out of the mixture.")
        self.tokens = shards.total_tokens
        self.lengths = shards.document_lengths
        """Tokens of each document, (D,)."""
        self._name, self._seed, self._starts = name, seed, shards.document_starts
        self._orders: dict[int, tuple[Array, Array]] = {}

    def take(self, first: int, count: int) -> Pieces:
        """Return the documents, or parts of them, that positions `first` to `first + count - 1` hold."""
        parts = []
        while count > 0:
            epoch, begin = divmod(first, self.tokens)
            part = min(count, self.tokens - begin)
            parts.append(self._within(epoch, begin, begin + part))
            first, count = first + part, count - part
        return Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def begun(self, position: int) -> int:
        """Return how many documents begin before `position`, those of earlier epochs included."""
        epoch, offset = divmod(position, self.tokens)
        _, ends_D = self._order(epoch)
        # Document n begins where document n - 1 ends; the first one begins at 0.
        return epoch * ends_D.size + (1 + int(np.searchsorted(ends_D[:-1], offset)) if offset else 0)

    def _within(self, epoch: int, begin: int, end: int) -> tuple[Array, Array, Array, Array]:
        """Return the columns of `Pieces` for tokens begin..end-1 of one epoch."""
        order_D, ends_D = self._order(epoch)
        low = int(np.searchsorted(ends_D, begin, side="right"))
        high = int(np.searchsorted(ends_D, end)) + 1
        documents_P = order_D[low:high]
        ends_P = ends_D[low:high]
        begins_P = ends_P - self.lengths[documents_P]
        offsets_P = np.maximum(begin - begins_P, 0)
        lengths_P = np.minimum(ends_P, end) - begins_P - offsets_P
        return self._starts[documents_P] + offsets_P, lengths_P, offsets_P, documents_P

    def _order(self, epoch: int) -> tuple[Array, Array]:
        """Return the documents of `epoch` in order, and where each of them ends."""
        if epoch in self._orders:
            return self._orders[epoch]
        order_D = random_stream(self._seed, f"source {self._name}", epoch).permutation(self.lengths.size)
        ends_D = np.cumsum(self.lengths[order_D])
        self._orders = {**{n: o for n, o in self._orders.items() if n == epoch - 1}, epoch: (order_D, ends_D)}
        return order_D, ends_D
