"""Packs whole conversations into rows of the context length, and defines the batch that training consumes."""
# B rows  T tokens

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Rows of tokens in which documents do not see each other."""

    tokens: np.ndarray[Any, Any]
    """(B, T) int64 token ids."""
    segments: np.ndarray[Any, Any]
    """(B, T) int32 number of the document within its row, ascending from 0; -1 is padding."""
    targets: np.ndarray[Any, Any]
    """(B, T) bool: this token is to be predicted from those before it. Never a document's first token."""


@dataclass(frozen=True)
class Row:
    """One packed row: the three arrays of `Batch`, each of shape (T,)."""

    tokens: np.ndarray[Any, Any]
    segments: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]


def stack(rows: Sequence[Row]) -> Batch:
    """Join rows into a batch."""
    return Batch(
        np.stack([row.tokens for row in rows]),
        np.stack([row.segments for row in rows]),
        np.stack([row.targets for row in rows]),
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over bins of `capacity` by best-fit decreasing; returns the item numbers of each bin.

    Longest first, the lower number first among equals; each goes to the fullest bin with room for it, the
    oldest among equals, or opens a new one. Raises ValueError for a length that is not in 0..capacity.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free capacity, bin number), ascending
    for item, length in _longest_first(lengths, capacity):
        place = bisect_left(room, (length, -1))
        if place == len(room):
            bins.append([])
            free, number = capacity, len(bins) - 1
        else:
            free, number = room.pop(place)
        bins[number].append(item)
        insort(room, (free - length, number))
    return bins


def fill(lengths: Sequence[int], capacity: int, bins: int) -> list[list[tuple[int, int, int]]]:
    """Distribute items over `bins` bins so that all are full; returns parts (item, first, length) of each bin.

    Best-fit decreasing, as `pack`. An item that fits nowhere whole is cut over the holes that remain in the end, the
    largest hole first. Raises ValueError when the items do not add up to all bins, or for a length not in
    0..capacity.
    """
    if sum(lengths) != capacity * bins:
        raise ValueError(f"items of {sum(lengths)} in all do not fill {bins} bins of {capacity}")
    parts: list[list[tuple[int, int, int]]] = [[] for _ in range(bins)]
    room = [(capacity, number) for number in range(bins)]
    left: list[tuple[int, int]] = []
    for item, length in _longest_first(lengths, capacity):
        place = bisect_left(room, (length, -1))
        if place == len(room):
            left.append((item, length))
        else:
            free, number = room.pop(place)
            parts[number].append((item, 0, length))
            insort(room, (free - length, number))
    for item, length in left:
        done = 0
        while done < length:
            free, number = room.pop()
            part = min(free, length - done)
            parts[number].append((item, done, part))
            done += part
            insort(room, (free - part, number))
    return parts


def _longest_first(lengths: Sequence[int], capacity: int) -> Iterator[tuple[int, int]]:
    """Yield (item, length), the lower number first among equals."""
    for item in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if not 0 <= lengths[item] <= capacity:
            raise ValueError(f"item {item} has length {lengths[item]}; allowed are 0..{capacity}")
        yield item, lengths[item]


Sample = tuple[Sequence[int] | np.ndarray[Any, Any], Sequence[bool] | np.ndarray[Any, Any]]
"""Token ids, and which of them to train on."""


def pack_conversations(samples: Sequence[Sample], context: int, pad_id: int) -> tuple[list[Row], int]:
    """Pack samples into rows; return rows and how many were left out.

    A sample that is empty or longer than `context` is left out whole: a cut conversation would teach the
    model to stop in the middle. Raises ValueError when a sample's mask has another length than its ids.
    """
    for number, (ids, mask) in enumerate(samples):
        if len(ids) != len(mask):
            raise ValueError(f"sample {number} has {len(ids)} token ids but a mask of {len(mask)}")
    fitting = [sample for sample in samples if 0 < len(sample[0]) <= context]
    bins = pack([len(ids) for ids, _ in fitting], context)
    rows = [_row([fitting[item] for item in items], context, pad_id) for items in bins]
    return rows, len(samples) - len(fitting)


def _row(samples: Sequence[Sample], context: int, pad_id: int) -> Row:
    tokens = np.full(context, pad_id, dtype=np.int64)
    segments = np.full(context, -1, dtype=np.int32)
    targets = np.zeros(context, dtype=bool)
    start = 0
    for number, (ids, mask) in enumerate(samples):
        end = start + len(ids)
        tokens[start:end] = ids
        segments[start:end] = number
        targets[start:end] = mask
        targets[start] = False  # nothing stands before it that could predict it
        start = end
    return Row(tokens, segments, targets)
