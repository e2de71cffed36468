"""Token shards: flat files of token ids, memory-mapped, with an index that is written last.

A folder holds `shard_00000.bin` (uint16, or uint32 when the vocabulary needs it), `shard_00000.documents.npy`
(int64 start of each document within the shard), `shard_00000.meta.npy` (int32, how many of a document's first
tokens are its metadata) and `index.json`. Readers need the index, and it appears by
rename after everything else, so a write that was interrupted never looks complete.
"""

from __future__ import annotations

import json
import os
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from step35.errors import DataError
from step35.runtime.disk import disk_errors, write_text

INDEX_VERSION = 1


class ShardWriter:
    """Writes documents into shards; as a context manager, publishes on success and removes all on failure."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = 2**24) -> None:
        """Start in `folder`, whose former shards are removed."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._documents: list[np.ndarray[Any, Any]] = []
        self._meta_tokens: list[int] = []
        self._buffered_tokens = 0
        self._shards: list[dict[str, Any]] = []
        self._tokens_by_source: Counter[str] = Counter()
        folder.mkdir(parents=True, exist_ok=True)
        self.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, ids: Sequence[int] | np.ndarray[Any, Any], source: str, *, meta_tokens: int = 0) -> None:
        """Append one document; `source` labels it in the index's token counts. An empty one is ignored.

        The first `meta_tokens` of its tokens are metadata, which a loader may keep from the loss.

        Raises `DataError` for ids outside the vocabulary, `DiskFullError` when a shard does not fit.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if not tokens.size:
            return
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise DataError(
                f"token ids {tokens.min()}..{tokens.max()} of {source!r} are outside "
                f"0..{self._vocab_size - 1}; use the tokenizer whose vocab_size the shards were given."
            )
        if self._buffered_tokens and self._buffered_tokens + tokens.size > self._shard_tokens:
            self._write_shard()
        self._documents.append(tokens.astype(self._dtype))
        self._meta_tokens.append(meta_tokens)
        self._buffered_tokens += tokens.size
        self._tokens_by_source[source] += tokens.size

    def close(self) -> None:
        """Write what is buffered, then publish the index. Raises `DiskFullError`."""
        if self._documents:
            self._write_shard()
        index = {
            "version": INDEX_VERSION,
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            "total_tokens": sum(shard["tokens"] for shard in self._shards),
            "tokens_by_source": dict(sorted(self._tokens_by_source.items())),
            "meta_tokens": True,
            "shards": self._shards,
        }
        with self._removed_on_failure():
            write_text(self._folder / "index.json", json.dumps(index, indent=1) + "\n")

    def discard(self) -> None:
        """Remove the index first, then all shards, finished or partial."""
        for pattern in ("index.json*", "shard_*"):
            for path in self._folder.glob(pattern):
                path.unlink()

    def _write_shard(self) -> None:
        tokens = np.concatenate(self._documents)
        lengths = [document.size for document in self._documents]
        starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        meta_tokens = np.array(self._meta_tokens, dtype=np.int32)
        name = f"shard_{len(self._shards):05d}"
        with self._removed_on_failure():
            _write(self._folder / f"{name}.bin", lambda file: file.write(tokens.data))
            _write(self._folder / f"{name}.documents.npy", lambda file: np.save(file, starts))
            _write(self._folder / f"{name}.meta.npy", lambda file: np.save(file, meta_tokens))
        self._shards.append(
            {
                "name": name,
                "tokens": tokens.size,
                "documents": len(lengths),
                "crc32": zlib.crc32(tokens.data),
            }
        )
        self._documents.clear()
        self._meta_tokens.clear()
        self._buffered_tokens = 0

    @contextmanager
    def _removed_on_failure(self) -> Iterator[None]:
        # Without their index the finished shards are useless too, and a full disk needs the room.
        try:
            yield
        except BaseException:
            self.discard()
            raise


class TokenShards:
    """Reads a folder of shards as one stream of tokens, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`; raises `DataError` when its index is missing or a file does not fit the index."""
        self.folder = folder
        index = _read_index(folder)
        self.vocab_size: int = index["vocab_size"]
        self.tokens_by_source: dict[str, int] = index["tokens_by_source"]
        self._dtype = np.dtype(index["dtype"])
        self._shards: list[dict[str, Any]] = index["shards"]
        self._maps = [self._map(shard) for shard in self._shards]
        self._checked: set[int] = set()
        self._borders: list[int] = [0, *accumulate(shard["tokens"] for shard in self._shards)]
        self.total_tokens = self._borders[-1]
        if self.total_tokens != index["total_tokens"]:
            raise DataError(_damaged(folder, f"shards hold {self.total_tokens} of {index['total_tokens']} tokens"))
        starts = [local + border for local, border in zip(self._read("documents"), self._borders[:-1], strict=True)]
        self.document_starts = np.concatenate([np.empty(0, dtype=np.int64), *starts])
        """Position of each document's first token in the whole stream, ascending, int64."""
        self.meta_tokens: np.ndarray[Any, Any] | None = None
        """Tokens of metadata at the start of each document, int32; None in shards written before they were counted."""
        if index.get("meta_tokens"):
            self.meta_tokens = np.concatenate([np.empty(0, dtype=np.int32), *self._read("meta")])

    @property
    def document_lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each document."""
        return np.diff(self.document_starts, append=self.total_tokens)

    def documents(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the tokens of each document in order."""
        for start, length in zip(self.document_starts.tolist(), self.document_lengths.tolist(), strict=True):
            yield self.slice(start, length)

    def slice(self, start: int, length: int) -> np.ndarray[Any, Any]:
        """Return tokens start .. start+length-1 of the stream; raises IndexError outside it.

        A shard is checked when it is first read from, which raises `DataError` if it is damaged.
        """
        if start < 0 or length < 0 or start + length > self.total_tokens:
            raise IndexError(f"tokens {start}..{start + length - 1} are not in 0..{self.total_tokens - 1}")
        parts = []
        shard = bisect_right(self._borders, start) - 1
        while length > 0:
            self._check(shard)
            offset = start - self._borders[shard]
            part = self._maps[shard][offset : offset + length]
            parts.append(part)
            start, length, shard = start + part.size, length - part.size, shard + 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=self._dtype)

    def verify(self) -> None:
        """Read everything and compare checksums; raises `DataError` naming the first damaged shard."""
        self._checked.clear()
        for number in range(len(self._shards)):
            self._check(number)

    def _check(self, number: int) -> None:
        shard = self._shards[number]
        if number not in self._checked and zlib.crc32(self._maps[number].data) != shard["crc32"]:
            raise DataError(_damaged(self.folder, f"{shard['name']}.bin does not match its checksum"))
        self._checked.add(number)

    def _map(self, shard: dict[str, Any]) -> np.ndarray[Any, Any]:
        path = self.folder / f"{shard['name']}.bin"
        expected = shard["tokens"] * self._dtype.itemsize
        size = path.stat().st_size if path.exists() else 0
        if size != expected:
            raise DataError(_damaged(self.folder, f"{path.name} has {size} bytes instead of {expected}"))
        return np.asarray(np.memmap(path, dtype=self._dtype, mode="r"))  # slices of np.memmap cost microseconds more

    def _read(self, what: str) -> list[np.ndarray[Any, Any]]:
        """Return the array of one number a document, `what`, of each shard."""
        found = []
        for shard in self._shards:
            path = self.folder / f"{shard['name']}.{what}.npy"
            try:
                numbers = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(_damaged(self.folder, f"{path.name} cannot be read ({error})")) from None
            if numbers.size != shard["documents"]:
                raise DataError(
                    _damaged(self.folder, f"{path.name} has {numbers.size} documents, not {shard['documents']}")
                )
            found.append(numbers)
        return found


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, then rename; on failure the partial file is removed. Raises `DiskFullError`."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with disk_errors(path):
            with partial.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # some file systems report a full disk only here
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise DataError(
            f"{folder} holds no finished token shards ({path.name} is missing); run `step35 prepare` again."
        ) from None
    except ValueError as error:
        raise DataError(_damaged(folder, f"{path.name} is not JSON ({error})")) from None
    if not isinstance(index, dict) or index.get("version") != INDEX_VERSION:
        raise DataError(_damaged(folder, f"{path.name} is not of version {INDEX_VERSION}"))
    return index


def _damaged(folder: Path, problem: str) -> str:
    return f"token shards in {folder} are damaged: {problem}. Delete the folder and run `step35 prepare` again."
