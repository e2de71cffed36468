"""Finds documents that repeat earlier ones: exact copies and near copies.

Near copies are found with a bottom-k sketch (Broder 1997): the `sketch_size` smallest hashes of the lines of
a document. The share of common values among the smallest of both sketches together estimates the Jaccard
similarity of the two sets of lines. An inverted index from hash to documents saves comparing all pairs. The
sketches stay in memory, which suits corpora up to some million documents.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

_SHORTEST_LINE_CHARS = 8
"""Shorter lines ("else:", "return x") occur everywhere and say nothing about copying."""


class Deduplicator:
    """Remembers documents and says whether a new one repeats one of them."""

    def __init__(self, *, threshold: float = 0.8, sketch_size: int = 64) -> None:
        """Call documents near copies when their estimated Jaccard similarity of lines is >= `threshold`."""
        self._threshold = threshold
        self._sketch_size = sketch_size
        self._exact: set[bytes] = set()
        self._sketches: list[frozenset[int]] = []
        self._documents_with: dict[int, list[int]] = defaultdict(list)

    def repeats(self, text: str) -> str:
        """Return "exact duplicate" or "near duplicate"; or remember `text` and return an empty string."""
        fingerprint = hashlib.blake2b(" ".join(text.split()).encode(errors="replace"), digest_size=16).digest()
        if fingerprint in self._exact:
            return "exact duplicate"
        sketch = self._sketch(text)
        if self._has_near_copy(sketch):
            return "near duplicate"
        self._exact.add(fingerprint)
        for value in sketch:
            self._documents_with[value].append(len(self._sketches))
        self._sketches.append(sketch)
        return ""

    def _sketch(self, text: str) -> frozenset[int]:
        stripped = (line.strip() for line in text.splitlines())
        lines = {line for line in stripped if len(line) >= _SHORTEST_LINE_CHARS}
        hashes = sorted(_hash(line) for line in lines)
        return frozenset(hashes[: self._sketch_size])

    def _has_near_copy(self, sketch: frozenset[int]) -> bool:
        if not sketch:
            return False
        shared = Counter(number for value in sketch for number in self._documents_with.get(value, ()))
        needed = self._threshold * len(sketch)
        return any(
            count >= needed and self._similarity(sketch, self._sketches[number]) >= self._threshold
            for number, count in shared.items()
        )

    def _similarity(self, left: frozenset[int], right: frozenset[int]) -> float:
        smallest = sorted(left | right)[: self._sketch_size]
        return sum(value in left and value in right for value in smallest) / len(smallest)


def _hash(line: str) -> int:
    # Not hash(): that one changes with every interpreter start.
    return int.from_bytes(hashlib.blake2b(line.encode(errors="replace"), digest_size=8).digest(), "big")
