"""Documents from the user's files: text, JSON lines, parquet, and token shards that were made here.

First step of a named source. Files are read as streams, so memory does not grow with them. A line that cannot be
used is counted, quoted with file and line number, and skipped, up to a stated limit; a file that is damaged as a
whole (cut off, failing its checksum) is an error that says how far it could be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step35.data.document import Document
from step35.data.lines import BadLines, kind_of, read_lines, read_records
from step35.data.shards import TokenShards
from step35.data.tokenizer import Tokenizer
from step35.errors import DataError

_TEXT_FILES = {
    ".txt": ("text", "unknown"),
    ".md": ("text", "unknown"),
    ".rst": ("text", "unknown"),
    ".py": ("code", "python"),
    ".c": ("code", "c"),
    ".h": ("code", "c"),
    ".cpp": ("code", "c++"),
    ".java": ("code", "java"),
    ".js": ("code", "javascript"),
    ".ts": ("code", "typescript"),
    ".go": ("code", "go"),
    ".rs": ("code", "rust"),
    ".sh": ("code", "shell"),
}
"""Suffix -> type and language of the meta line."""
_PIECE_BYTES = 1_000_000
"""A longer text file becomes several documents, cut at line ends."""
_META_LINE = re.compile(r"type: (.*?) \| language: (.*?) \| domain: (.*?) \| source: (.*)")
_META_FIELDS = ("kind", "language", "domain", "source")


def read_documents(
    paths: Sequence[Path], bad: BadLines, *, domain: str, text_field: str = "text"
) -> Iterator[Document]:
    """Yield the documents of files and folders in order of their names; records may bring their own meta fields.

    Raises `DataError` for a path that does not exist or is of no known kind, for a damaged file, and for one bad
    line too many.
    """
    for given in paths:
        if not given.exists():
            raise DataError(f"{given} does not exist; give files or folders of {_known()}.")
        for path in _files(given, bad):
            reader = _reader(path)
            if reader:
                yield from reader(_File(path, path.relative_to(given.parent).as_posix(), domain, text_field, bad))
            elif path != given:
                bad.leave_out(path, "suffix is not one that can be read")
            else:
                raise DataError(f"{path} is of no known kind; give files or folders of {_known()}.")


@dataclass(frozen=True)
class _File:
    """A file to read, and what its reader needs to know."""

    path: Path
    name: str
    domain: str
    text_field: str
    bad: BadLines

    def document(self, text: str, **meta: object) -> Document:
        """Return a document; meta fields that are no texts take the file's own values."""
        own = {"kind": "text", "language": "unknown", "domain": self.domain, "source": self.name}
        given = {
            key: " ".join(value.split()) for key, value in meta.items() if isinstance(value, str) and value.strip()
        }
        return Document(text, **own | given)

    def from_record(self, record: Any, line: int, content: str | bytes) -> Iterator[Document]:
        """Yield the record's document, or nothing after noting why there is none."""
        text = record.get(self.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            self.bad.add(self.path, line, f"not an object with a text in field {self.text_field!r}", content)
        elif not text.strip():
            self.bad.add(self.path, line, "empty text", content)
        else:
            yield self.document(text, **{key: record.get(key) for key in _META_FIELDS})


def _files(path: Path, bad: BadLines) -> Iterator[Path]:
    """Yield the files below `path` in order of their names; a folder of token shards counts as one."""
    if path.is_file() or _holds_shards(path):
        yield path
    elif path.is_dir():
        try:
            children = sorted(path.iterdir())
        except OSError as error:
            return bad.leave_out(path, str(error.strerror))
        for child in children:
            if child.is_symlink() and child.is_dir():
                bad.leave_out(child, "a link to a folder, which may lead in circles; give the folder itself")
            else:
                yield from _files(child, bad)
    else:
        bad.leave_out(path, "a pipe, socket or device" if path.exists() else "No such file, the link is broken")


def _holds_shards(folder: Path) -> bool:
    return (folder / "index.json").is_file() and any(folder.glob("shard_*.bin"))


def _reader(path: Path) -> Callable[[_File], Iterator[Document]] | None:
    """Return the reader for what `path` is, None when there is none."""
    if path.is_dir():
        return _token_shards
    suffix = kind_of(path)
    if suffix == ".jsonl":
        return _json_lines
    if suffix in _TEXT_FILES:
        return _text
    return _parquet if path.suffix == ".parquet" else None


def _known() -> str:
    return f"{', '.join(_TEXT_FILES)}, .jsonl (each also as .gz or .zst), .parquet, or folders of token shards"


def _text(file: _File) -> Iterator[Document]:
    """Yield a text file as one document, a long one as several."""
    suffixes = [suffix for suffix in file.path.suffixes if suffix in _TEXT_FILES]
    kind, language = _TEXT_FILES[suffixes[-1]]
    line = 1
    for piece in _pieces(read_lines(file.path, file.bad)):
        try:
            text = piece.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            read = bytes(error.object)  # the piece without its byte order mark, which `error.start` does not count
            at = read.count(b"\n", 0, error.start)
            file.bad.add(file.path, None, f"not UTF-8 in line {line + at}", read.split(b"\n")[at])
        else:
            if "\0" in text:
                at = text.count("\n", 0, text.index("\0"))
                file.bad.add(file.path, None, f"contains null bytes in line {line + at}", text.split("\n")[at])
            elif text.strip():
                yield file.document(text, kind=kind, language=language)
            else:
                file.bad.add(file.path, None, "empty text")
        line += piece.count(b"\n")


def _pieces(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Join lines to pieces of about `_PIECE_BYTES`."""
    piece, size = [], 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= _PIECE_BYTES:
            yield b"".join(piece)
            piece, size = [], 0
    if piece:
        yield b"".join(piece)


def _json_lines(file: _File) -> Iterator[Document]:
    for number, record, line in read_records(file.path, file.bad):
        yield from file.from_record(record, number, line)


def _parquet(file: _File) -> Iterator[Document]:
    """Yield the rows of a parquet file, of which only the columns that are needed are read."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{file.path} needs the pyarrow package: pip install 'step35[data]'.") from None
    row = 0
    try:
        with ParquetFile(file.path) as parquet:
            names = parquet.schema_arrow.names
            if file.text_field not in names:
                raise DataError(f"{file.path} has no column {file.text_field!r}; set text_field to one of {names}.")
            wanted = [name for name in names if name in (file.text_field, *_META_FIELDS)]
            for batch in parquet.iter_batches(batch_size=256, columns=wanted):
                for cells in zip(*batch.columns, strict=True):
                    row += 1
                    yield from _parquet_row(file, row, dict(zip(batch.schema.names, cells, strict=True)))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file.path} can be read up to row {row} and no further: {error}. "
            "Copy it again from its source, or leave it out."
        ) from None


def _parquet_row(file: _File, row: int, cells: dict[str, Any]) -> Iterator[Document]:
    try:
        record = {name: cell.as_py() for name, cell in cells.items()}
    except UnicodeDecodeError:
        file.bad.add(file.path, row, "not UTF-8")
    else:
        yield from file.from_record(record, row, str(record))


def _token_shards(file: _File) -> Iterator[Document]:
    """Yield the documents of a folder of token shards, decoded with the tokenizer that made them."""
    shards = TokenShards(file.path)
    homes = [parent for parent in file.path.resolve().parents[:3] if (parent / "tokenizer").is_dir()]
    if not homes:
        raise DataError(f"{file.path} holds token shards, but there is no tokenizer/ beside or above it to read them.")
    tokenizer = Tokenizer.load(homes[0] / "tokenizer")
    if shards.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"{file.path} holds token shards of {shards.vocab_size:,} tokens, but {homes[0] / 'tokenizer'} has "
            f"{tokenizer.vocab_size:,}; put the tokenizer that made the shards beside or above them."
        )
    for ids in shards.documents():
        meta, _, text = tokenizer.decode(ids[1:-1].tolist()).partition("\n")
        fields = _META_LINE.fullmatch(meta)
        if fields:
            yield file.document(text, **dict(zip(_META_FIELDS, fields.groups(), strict=True)))
        else:
            yield file.document(f"{meta}\n{text}")
