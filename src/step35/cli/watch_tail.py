"""Read a growing JSONL file bit by bit: each call gives the lines written since the last one.

The writer may be killed in the middle of a line (the torn line waits until it is whole), and a resume or a rollback may
replace the file by a shorter one (then reading starts again from its beginning).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

CHUNK_BYTES = 4 * 2**20
"""Most that one call reads, so that a first look at gigabytes is many short waits and not one long one."""

MARK_BYTES = 64


class Lines(NamedTuple):
    """What one call found."""

    restarted: bool
    """The file is another one than before: forget what earlier calls gave."""
    lines: list[tuple[int, bytes]]
    """(offset in bytes, line without its newline), in order."""
    behind_bytes: int
    """What is left to read; a torn last line counts."""


class Tail:
    """A place in a file that may grow, be replaced, or not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._inode = 0
        self._mark = b""

    def read(self, limit: int = CHUNK_BYTES) -> Lines:
        """Return the whole lines after the last call's, about `limit` bytes of them."""
        try:
            with open(self.path, "rb") as file:
                return self._read(file, limit)
        except FileNotFoundError:
            restarted = self.offset > 0
            self.offset = 0
            return Lines(restarted, [], 0)

    def _read(self, file: BinaryIO, limit: int) -> Lines:
        restarted = self.offset > 0 and not self._same(file)
        if restarted:
            self.offset = 0
        file.seek(self.offset)
        content = file.read(limit)
        if len(content) == limit:
            content += file.readline()  # so that a line longer than `limit` comes through
        *whole, _torn = content.split(b"\n")
        lines, place = [], self.offset
        for line in whole:
            lines.append((place, line))
            place += len(line) + 1
        self._remember(file, place)
        return Lines(restarted, lines, max(0, os.fstat(file.fileno()).st_size - place))

    def _same(self, file: BinaryIO) -> bool:
        """Say whether what was read before still stands in the file, by its inode and by the last bytes read."""
        # Neither alone will do: inode numbers are used again, and a replayed step may write the same bytes.
        if os.fstat(file.fileno()).st_ino != self._inode:
            return False
        file.seek(self.offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _remember(self, file: BinaryIO, offset: int) -> None:
        self.offset, self._inode = offset, os.fstat(file.fileno()).st_ino
        file.seek(max(0, offset - MARK_BYTES))
        self._mark = file.read(min(offset, MARK_BYTES))


def line_at(path: Path, offset: int) -> bytes:
    """Return the line of `path` that begins at byte `offset`; b"" when the file has become shorter or is gone."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.readline()
    except FileNotFoundError:
        return b""
