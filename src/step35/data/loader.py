"""Rows as pure functions of (seed, row number), so that a resumed run sees exactly what an unbroken one would.

Pre-training rows are consecutive windows of the token stream; attention, position and loss stop at document
borders within a row (`Batch.segments`). Each epoch is its own permutation of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from step35.data.packing import Batch, Row, stack
from step35.data.shards import TokenShards
from step35.errors import DataError


class Loader(Protocol):
    """Rows as a pure function of their numbers."""

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count - 1`."""
        ...


class PretrainLoader:
    """Batches of full rows from token shards."""

    def __init__(self, shards: TokenShards, context: int, seed: int) -> None:
        """Cut the stream into rows of `context` tokens; raises `DataError` when there is not one."""
        self.rows_per_epoch = _full_rows(shards, context)
        self._shards = shards
        self._context = context
        self._order = _EpochOrder(self.rows_per_epoch, seed)

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count - 1` of an endless sequence that the data and the seed fix."""
        return stack([_stream_row(self._shards, self._context, row) for row in self._order.rows(first, count)])


class PackedLoader:
    """Batches of packed rows, see `pack_conversations`."""

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        """Serve `rows`; raises `DataError` when there are none."""
        if not rows:
            raise DataError("no packed rows: every conversation was left out; raise the context or add data.")
        self.rows_per_epoch = len(rows)
        self._rows = rows
        self._order = _EpochOrder(len(rows), seed)

    @property
    def filled(self) -> float:
        """Share of the rows' tokens that are no padding."""
        return float(np.mean([(row.segments >= 0).mean() for row in self._rows]))

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count - 1` of an endless sequence that the packed rows and the seed fix."""
        return stack([self._rows[row] for row in self._order.rows(first, count)])


def validation(shards: TokenShards, context: int, max_rows: int) -> Batch:
    """Return the first rows of the stream in order, at most `max_rows`, as one batch.

    Raises `DataError` when the stream holds less than one row.
    """
    count = min(max_rows, _full_rows(shards, context))
    return stack([_stream_row(shards, context, row) for row in range(count)])


class _EpochOrder:
    """The order of rows: one permutation after the other."""

    def __init__(self, row_count: int, seed: int) -> None:
        self._row_count = row_count
        self._seed = seed
        self._cached: tuple[int, np.ndarray[Any, Any]] | None = None

    def rows(self, first: int, count: int) -> list[int]:
        return [self._row(position) for position in range(first, first + count)]

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self._row_count)
        if self._cached is None or self._cached[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._row_count)
            self._cached = (epoch, order)
        return int(self._cached[1][index])


def _full_rows(shards: TokenShards, context: int) -> int:
    rows = shards.total_tokens // context
    if not rows:
        raise DataError(
            f"{shards.folder} holds {shards.total_tokens} tokens, less than one row of context={context}; "
            "choose a shorter context, or prepare more text (corpus_chars, val_tokens)."
        )
    return rows


def _stream_row(shards: TokenShards, context: int, row: int) -> Row:
    start = row * context
    tokens = shards.slice(start, context).astype(np.int64)
    positions = np.arange(start, start + context)
    documents = np.searchsorted(shards.document_starts, positions, side="right")
    segments = (documents - documents[0]).astype(np.int32)
    targets = np.zeros(context, dtype=bool)
    targets[1:] = segments[1:] == segments[:-1]
    return Row(tokens, segments, targets)
