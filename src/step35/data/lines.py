"""Lines of plain and compressed files, as streams, and the account of what cannot be used."""

from __future__ import annotations

import gzip
import json
import math
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from step35.errors import DataError

_QUOTES = 10


@dataclass
class BadLines:
    """Lines that cannot be used, and files that are left out: counted, and the first ten of each are quoted."""

    limit: float = math.inf
    """More bad lines than this are an error."""
    count: int = 0
    """Bad lines; a piece of a text counts as one."""
    quotes: list[str] = field(default_factory=list)
    """Of lines: "file:line: reason: content"; of texts without the line."""
    left_out: int = 0
    """Files."""
    files: list[str] = field(default_factory=list)
    """Of files: "file: reason"."""

    def add(self, path: Path, line: int | None, reason: str, content: str | bytes = "") -> None:
        """Count a line, or a text (None); raises `DataError` when it is one too many."""
        self.count += 1
        if self.count <= _QUOTES:
            text = content[:80].decode(errors="replace") if isinstance(content, bytes) else content[:80]
            place = path if line is None else f"{path}:{line}"
            self.quotes.append(f"{place}: {reason[:200]}: {text.strip()}")
        if self.count > self.limit:
            raise DataError(
                f"more than max_bad_lines={self.limit} lines cannot be used; repair them, or raise the limit. "
                "The first:\n  " + "\n  ".join(self.quotes)
            )

    def leave_out(self, name: str | Path, reason: str) -> None:
        """Count a file that is not read."""
        self.left_out += 1
        if self.left_out <= _QUOTES:
            self.files.append(f"{name}: {reason}")

    def record(self) -> dict[str, Any]:
        """Return the counts and the quotes as JSON values."""
        return {"bad_lines": self.count, "files_left_out": self.left_out, "quotes": [*self.quotes, *self.files]}


def total(records: Collection[dict[str, Any]]) -> dict[str, Any]:
    """Add up what `BadLines.record` returned; of `skipped`, the quotes, the last says how many more there are."""
    lines, files = (sum(record[count] for record in records) for count in ("bad_lines", "files_left_out"))
    quotes = [quote for record in records for quote in record["quotes"]]
    more = lines + files - len(quotes)
    return {"bad_lines": lines, "files_left_out": files, "skipped": quotes + [f"and {more:,} more"] * bool(more)}


def read_lines(path: Path, bad: BadLines) -> Iterator[bytes]:
    """Yield the lines of a plain or compressed file, or leave it out when it is empty.

    Raises `DataError` when it is damaged.
    """
    lines = size = 0
    opener = COMPRESSED.get(path.suffix, partial(open, mode="rb"))
    try:
        with opener(path) as stream:
            for line in stream:
                lines, size = lines + 1, size + len(line)
                yield line
    except (OSError, EOFError, zlib.error, _zstd_error()) as error:
        raise DataError(
            f"{path} can be read up to line {lines} ({size:,} bytes of text) and no further: {error}. "
            "Copy it again from its source, or leave it out."
        ) from None
    if not lines:
        bad.leave_out(path, "empty")


def read_records(path: Path, bad: BadLines) -> Iterator[tuple[int, Any, bytes]]:
    """Yield the number, the value and the content of each line of JSON; lines that are none go to `bad`.

    Raises `DataError` as `read_lines` and `BadLines.add` do.
    """
    for number, line in enumerate(read_lines(path, bad), start=1):
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            bad.add(path, number, "not UTF-8", line)
        except (ValueError, RecursionError) as error:
            bad.add(path, number, f"not JSON ({error})" if line.strip() else "empty line", line)
        else:
            yield number, record, line


def read_list(path: Path, bad: BadLines) -> Iterator[tuple[int, Any, bytes]]:
    """Yield the number and the value of each element, and no content, of a file that is one list of JSON, read whole.

    Raises `DataError` as `read_lines` does, and when the file is something else.
    """
    try:
        values = json.loads(b"".join(read_lines(path, bad)).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON ({error}); records on lines of their own need the suffix .jsonl."
        ) from None
    if not isinstance(values, list):
        raise DataError(
            f"{path} is one JSON {type(values).__name__}; give a list of records, or lines in a .jsonl file."
        )
    for number, value in enumerate(values, start=1):
        yield number, value, b""


def _open_zstd(path: Path) -> BinaryIO:
    try:
        stream: BinaryIO = zstd().open(path, "rb")
    except ImportError:
        raise DataError(f"{path} needs the backports.zstd package: pip install 'step35[data]'.") from None
    return stream


def zstd() -> Any:
    """Return the zstd module: the standard library's from Python 3.14 on, its backport before."""
    if sys.version_info >= (3, 14):
        from compression import zstd as module
    else:
        from backports import zstd as module
    return module


def _zstd_error() -> type[Exception]:
    try:
        error: type[Exception] = zstd().ZstdError
    except ImportError:
        return EOFError  # which is caught anyway
    return error


def kind_of(path: Path) -> str:
    """Return the suffix of what a plain or compressed file holds."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _open_zstd}
"""Suffix -> how to open the file behind it."""
