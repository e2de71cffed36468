"""Corpora that every machine has, by name: what `builtin = "..."` of a named source means.

Each is a function of the seed that yields documents, without end or until the machine has no more; files that it
cannot read are noted in the account that it is given.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from itertools import count

from step35.config.base import suggest
from step35.data import needle
from step35.data.dedup import Deduplicator
from step35.data.document import Document
from step35.data.lines import BadLines
from step35.data.mixture import arithmetic_documents
from step35.data.sources import SourceFile, SourceReport, code_documents, docstring_documents, python_files
from step35.errors import ConfigError


def code(seed: int, bad: BadLines) -> Iterator[Document]:
    """Yield Python files of the standard library and of installed, permissively licensed packages."""
    report = SourceReport(bad=bad)
    files = (file for file in python_files(random.Random(seed), report) if not _for_documentation(file))
    return _without_copies(code_documents(files, report=report))


def documentation(seed: int, bad: BadLines) -> Iterator[Document]:
    """Yield the docstrings of files that `code` leaves out, so that neither repeats the other."""
    report = SourceReport(bad=bad)
    files = (file for file in python_files(random.Random(seed), report) if _for_documentation(file))
    return _without_copies(docstring_documents(files, report=report))


def _needles(characters: int) -> Callable[[int, BadLines], Iterator[Document]]:
    """Return the endless corpus of pass-key texts of about `characters` characters."""

    def documents(seed: int, bad: BadLines) -> Iterator[Document]:
        texts = (needle.document(index, seed=seed, characters=characters) for index in count())
        return (Document(text, "recall", "english", "facts", "procedural") for text in texts)

    return documents


BUILTIN: dict[str, Callable[[int, BadLines], Iterator[Document]]] = {
    "code": code,
    "documentation": documentation,
    "arithmetic": lambda seed, bad: arithmetic_documents(seed),
    "needle": _needles(700),
    "needle-4k": _needles(4_000),
    "needle-8k": _needles(8_000),
    "needle-100k": _needles(100_000),
}
"""Name -> documents for a seed."""


def builtin_documents(name: str, seed: int, bad: BadLines) -> Iterator[Document]:
    """Return the documents of the built-in corpus `name`; raises `ConfigError` when there is none."""
    if name not in BUILTIN:
        raise ConfigError(f"no corpus is called builtin={name!r}.{suggest(name, BUILTIN)} Choose from {list(BUILTIN)}.")
    return BUILTIN[name](seed, bad)


def _for_documentation(file: SourceFile) -> bool:
    """Say whether a file gives its docstrings and not its code: a third of them, fixed by a hash of the name."""
    return hashlib.blake2b(file.source.encode(errors="replace"), digest_size=8).digest()[0] % 3 == 0


def _without_copies(documents: Iterator[Document]) -> Iterator[Document]:
    deduplicator = Deduplicator()
    return (document for document in documents if not deduplicator.repeats(document.text))
