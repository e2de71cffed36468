"""Fixed-size blocks of key-value memory: who holds them, and which prefix of tokens an idle one still remembers.

A block that nobody holds keeps its content until it is needed, the least recently released first. Its key names
all tokens up to its end, so that equal keys mean equal content.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 16

NOWHERE = -1
"""Stands in a block table where the block was given back."""


class BlockPool:
    """`count` blocks, numbered from 0. Raises `IndexError` when more are taken than there are."""

    def __init__(self, count: int) -> None:
        self.holders = [0] * count
        self._idle: dict[int, None] = dict.fromkeys(range(count))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._idle)

    def take(self) -> int:
        """Hold a block of one's own; what it remembered is forgotten."""
        if not self._idle:
            raise IndexError("no block is left")
        block = next(iter(self._idle))
        del self._idle[block]
        self.holders[block] = 1
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
        return block

    def knows(self, key: bytes) -> bool:
        """Return whether some block has the content that `key` names."""
        return key in self._block_of

    def share(self, key: bytes) -> int:
        """Hold the block that `key` names, together with whoever holds it already."""
        block = self._block_of[key]
        self._idle.pop(block, None)
        self.holders[block] += 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Let others find this block, whose content is complete; the first of several equal ones is found."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def release(self, block: int) -> None:
        """Let go of a block; it is idle once nobody holds it."""
        if self.holders[block] < 1:
            raise ValueError(f"block {block} was given back more often than it was taken")
        self.holders[block] -= 1
        if not self.holders[block]:
            self._idle[block] = None


def chain(key: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of the block with `tokens` behind the block that `key` names."""
    return hashlib.blake2b(key + array("q", tokens).tobytes(), digest_size=16).digest()
