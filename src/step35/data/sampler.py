"""The mixture sampler: rows from several sources by weight, as a pure function of (seed, row number).

The rows are cut into windows of W rows of T tokens. Source s gives exactly q_s tokens to each window, where q_s is
weight_s * W * T rounded so that the q_s add up to W * T (largest remainder). Window w holds the positions
[w q_s, (w + 1) q_s) of the source's stream (`stream`). So the place of every token follows from the row number, no
cursor is kept, and the account of documents, tokens and epochs is exact arithmetic.

Inside a window, documents are packed best-fit decreasing into the W rows; the few that fit nowhere whole are cut over
the holes that are left, so there is no padding (`packing.fill`). Each part of a document in a row is a segment of its
own. Quality filters and curriculum are not decided here: a stage chooses weights.
"""
# T tokens of a row (context)  W rows of a window  P pieces of a window

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from step35.config.base import suggest
from step35.data.packing import Batch, Row, fill, stack
from step35.data.shards import TokenShards
from step35.data.stream import Array, SourceStream, random_stream
from step35.errors import ConfigError, DataError


@dataclass(frozen=True)
class SourceAccount:
    """What some rows hold of one source."""

    documents: int
    """Documents whose first token is among them."""
    tokens: int
    epochs: float
    """`tokens` over the tokens of the source."""


@dataclass(frozen=True)
class Packing:
    """How well documents fit the rows."""

    pieces_per_row: float
    cut: float
    """Share of the documents that would fit a row but were cut, by a window's border or to fill a hole."""
    targets: float
    """Share of the tokens that stand behind another one of their piece, and can be predicted from it."""


@dataclass(frozen=True)
class _Window:
    """The pieces of a window in order of their rows, (P,) each, and where each row begins among them, (W + 1,)."""

    sources: Array
    starts: Array
    lengths: Array
    offsets: Array
    whole: Array
    """Length of the document that the piece is of."""
    meta: Array
    """How many of the piece's first tokens are metadata."""
    rows: Array


class MixtureLoader:
    """Rows from several sources by weight."""

    def __init__(
        self,
        sources: Mapping[str, TokenShards],
        weights: Mapping[str, float],
        *,
        context: int,
        seed: int,
        window_rows: int = 256,
        mask_meta_from: int | None = None,
        start: Mapping[str, int] | None = None,
    ) -> None:
        """Mix the `sources` that `weights` names; weights are relative.

        From row `mask_meta_from` on, metadata tokens are no targets (app. A.3 of the report). `start` says where
        in its stream each source begins (0 without an entry), so that a stage goes on `behind` the ones before it.
        Raises `ConfigError` for weights that cannot be kept, `DataError` for sources that do not go together.
        """
        _check(sources, weights, mask_meta_from)
        self.quotas = quotas(weights, window_rows * context)
        """Tokens of each source in a window."""
        self._names = list(weights)
        self._shards = [sources[name] for name in self._names]
        self._streams = [SourceStream(name, sources[name], seed) for name in self._names]
        self._start = {name: (start or {}).get(name, 0) for name in self._names}
        self._context, self._seed, self._window_rows = context, seed, window_rows
        self._mask_meta_from = mask_meta_from
        self._windows: dict[int, _Window] = {}

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count - 1` of an endless sequence that the data and the seed fix."""
        return stack([self._row(number) for number in range(first, first + count)])

    def account(self, rows: int) -> dict[str, SourceAccount]:
        """Return what the first `rows` rows hold of each source, exactly."""
        windows, part = divmod(rows, self._window_rows)
        found = {}
        for number, (name, stream) in enumerate(zip(self._names, self._streams, strict=True)):
            offset, taken = self._start[name], windows * self.quotas[name]
            documents = stream.begun(offset + taken) - stream.begun(offset)
            if part:
                window = self._window(windows)
                served = slice(0, window.rows[part])
                own = window.sources[served] == number
                taken += int(window.lengths[served][own].sum())
                documents += int((window.offsets[served][own] == 0).sum())
            found[name] = SourceAccount(documents, taken, taken / stream.tokens)
        return found

    def behind(self, rows: int) -> dict[str, int]:
        """Return where each source's stream stands behind the windows of the first `rows` rows.

        What the last window holds beyond those rows is skipped, so that nothing is read twice.
        """
        windows = -(-rows // self._window_rows)
        return {name: offset + windows * self.quotas[name] for name, offset in self._start.items()}

    def packing(self, windows: int = 1) -> Packing:
        """Measure the packing of the first `windows` windows."""
        found = [self._window(number) for number in range(windows)]
        lengths, offsets, whole = (
            np.concatenate([getattr(window, name) for window in found]) for name in ("lengths", "offsets", "whole")
        )
        begun = (offsets == 0) & (whole <= self._context)
        rows = windows * self._window_rows
        return Packing(
            pieces_per_row=lengths.size / rows,
            cut=float((lengths < whole)[begun].mean()) if begun.any() else 0.0,
            targets=1 - lengths.size / (rows * self._context),
        )

    def _row(self, number: int) -> Row:
        at, row = divmod(number, self._window_rows)
        window = self._window(at)
        tokens = np.empty(self._context, dtype=np.int64)
        segments = np.empty(self._context, dtype=np.int32)
        targets = np.ones(self._context, dtype=bool)
        masked = self._mask_meta_from is not None and number >= self._mask_meta_from
        own = slice(window.rows[row], window.rows[row + 1])
        columns = (window.sources[own], window.starts[own], window.lengths[own], window.meta[own])
        begin = 0
        for segment, (source, start, length, meta) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            end = begin + length
            tokens[begin:end] = self._shards[source].slice(start, length)
            segments[begin:end] = segment
            targets[begin] = False  # nothing stands before it that could predict it
            if masked:
                targets[begin : begin + meta] = False
            begin = end
        return Row(tokens, segments, targets)

    def _window(self, number: int) -> _Window:
        """Return the layout of a window; its neighbours are kept, since a batch may lie in two."""
        window = self._windows.get(number) or self._lay_out(number)
        self._windows = {n: w for n, w in self._windows.items() if abs(n - number) == 1} | {number: window}
        return window

    def _lay_out(self, number: int) -> _Window:
        """Take every source's tokens of the window, cut them to pieces of a row at most, and pack these."""
        columns = [self._pieces(number, source) for source in range(len(self._names))]
        sources, starts, lengths, offsets, whole, meta = (np.concatenate(c) for c in zip(*columns, strict=True))
        bins = fill(lengths.tolist(), self._context, self._window_rows)
        order = random_stream(self._seed, "rows", number).permutation(self._window_rows)
        parts = np.array([part for row in order for part in bins[row]], dtype=np.int64)
        item, skipped, length = parts.T
        counts = [len(bins[row]) for row in order]
        return _Window(
            sources=sources[item],
            starts=starts[item] + skipped,
            lengths=length,
            offsets=offsets[item] + skipped,
            whole=whole[item],
            meta=np.clip(meta[item] - offsets[item] - skipped, 0, length),
            rows=np.cumsum([0, *counts]),
        )

    def _pieces(self, window: int, source: int) -> tuple[Array, ...]:
        """Return source number, start, length, offset, document length and document metadata of each piece."""
        name, stream, shards = self._names[source], self._streams[source], self._shards[source]
        quota = self.quotas[name]
        pieces = stream.take(self._start[name] + window * quota, quota)
        parts = -(-pieces.lengths // self._context)  # how many parts of at most a row each of them is cut to
        piece = np.repeat(np.arange(parts.size), parts)
        part = np.arange(piece.size) - (np.cumsum(parts) - parts)[piece]
        skipped = part * self._context
        documents = pieces.documents[piece]
        return (
            np.full(piece.size, source),
            pieces.starts[piece] + skipped,
            np.minimum(pieces.lengths[piece] - skipped, self._context),
            pieces.offsets[piece] + skipped,
            stream.lengths[documents],
            np.zeros_like(documents) if shards.meta_tokens is None else shards.meta_tokens[documents],
        )


def quotas(weights: Mapping[str, float], tokens: int) -> dict[str, int]:
    """Divide `tokens` by weight into whole numbers: the largest remainders are rounded up, the earlier name first.

    Raises `ConfigError` for a weight that is not above 0 or gives less than a token.
    """
    bad = {name: weight for name, weight in weights.items() if not weight > 0}
    if bad or not weights:
        raise ConfigError(f"weights must be above 0, not {bad}; leave a source out of the mixture instead.")
    total = sum(map(Fraction, weights.values()))
    shares = {name: Fraction(weight) * tokens / total for name, weight in weights.items()}
    whole = {name: int(share) for name, share in shares.items()}
    missing = tokens - sum(whole.values())
    for name in sorted(shares, key=lambda name: whole[name] - shares[name])[:missing]:
        whole[name] += 1
    for name, quota in whole.items():
        if not quota:
            raise ConfigError(
                f"weight {weights[name]} of source {name!r} is less than one of the {tokens:,} tokens of a window; "
                "raise it, or leave the source out."
            )
    return whole


def _check(sources: Mapping[str, TokenShards], weights: Mapping[str, float], mask_meta_from: int | None) -> None:
    for name in weights:
        if name not in sources:
            raise ConfigError(f"no source is called {name!r}.{suggest(name, sources)} Choose from {list(sources)}.")
        if mask_meta_from is not None and sources[name].meta_tokens is None:
            raise DataError(
                f"the token shards in {sources[name].folder} do not say which tokens are metadata, so these cannot be "
                "masked; delete the folder and run `step35 prepare` again."
            )
    sizes = {name: sources[name].vocab_size for name in weights}
    if len(set(sizes.values())) > 1:
        raise DataError(f"the sources have different vocabularies, {sizes}; prepare them together.")
