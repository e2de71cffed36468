"""Real text that every machine has: standard library, installed packages, their docstrings, the user's files.

First step of `prepare`. Each document carries the report's meta tokens (app. A.3): a readable line of type,
language, domain and source. What cannot be read of the machine's files never stops a run: it is counted, and the
first are named in the report. A file gives either its code or its docstrings, never both, so validation cannot
repeat what training has seen.

Deterministic for one Python environment: files are sorted before they are shuffled by seed, and named
relative to their root. It judges quality by simple rules only; there are no learned scorers here.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path, PurePath
from typing import Any

from step35.data.dedup import Deduplicator
from step35.data.docstrings import docstring_document
from step35.data.document import Document
from step35.data.licences import licence_problem
from step35.data.lines import BadLines, total
from step35.data.readers import read_documents

STDLIB_SHARE = 0.60
PACKAGES_SHARE = 0.25
_MOST_FILE_CHARS = 200_000
"""Longer source files are nearly always generated."""
_LEAST_DOCSTRING_CHARS = 300
_LONGEST_LINE_CHARS = 5_000
_SKIPPED_FOLDERS = frozenset(
    """
    __pycache__ _vendor dist-packages idlelib lib2to3 site-packages test tests third_party vendor
    """.split()  # noqa: SIM905
)
_DATA_LINE = re.compile(r"""\s*[\[({]*\s*([bBuUrR]?(?P<quote>['"])(?!(?P=quote){2})|[-+.]?\d)""")
"""A line that starts with a literal: a table row. Docstrings (three quotes) are not meant."""


@dataclass
class SourceReport:
    """What was taken and what was left out, and why."""

    documents: Counter[str] = field(default_factory=Counter)
    """Documents taken, by kind."""
    characters: Counter[str] = field(default_factory=Counter)
    """Characters taken, by kind."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Files left out by rule: reason -> count."""
    bad: BadLines = field(default_factory=BadLines)
    """Files and lines that could not be read."""
    packages_left_out: dict[str, str] = field(default_factory=dict)
    """Installed packages not used because of their licence: name -> reason."""

    def record(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "bad"} | total([self.bad.record()])


@dataclass(frozen=True)
class SourceFile:
    """A Python file of this machine."""

    path: Path
    source: str
    """Relative name, as in `Document`."""
    domain: str


def collect(
    budget_chars: int,
    seed: int,
    extra: Sequence[Path] = (),
    *,
    on_progress: Callable[[int], None] = lambda characters: None,
) -> tuple[list[Document], SourceReport]:
    """Sample about `budget_chars` characters of documents, the user's files (`extra`) first.

    The rest is 60% standard library code, 25% package code and 15% docstrings; what one source lacks, the
    next one fills. `on_progress` gets the characters taken so far. Raises `DataError` as `read_documents` does.
    """
    collection = _Collection(on_progress)
    report = collection.report
    rng = random.Random(seed)
    collection.take_until(budget_chars, read_documents(extra, report.bad, domain="user"))
    start = collection.characters
    rest = max(0, budget_chars - start)
    # One document is at most a fiftieth of the budget, so that small corpora are mixed too.
    most_chars = min(_MOST_FILE_CHARS, max(4_000, rest // 50))
    stdlib = iter(_interleave([_stdlib_files(report)], rng))
    packages = iter(_interleave(_package_files(report), rng))
    collection.take_until(start + int(rest * STDLIB_SHARE), code_documents(stdlib, most_chars, report=report))
    collection.take_until(
        start + int(rest * (STDLIB_SHARE + PACKAGES_SHARE)), code_documents(packages, most_chars, report=report)
    )
    collection.take_until(start + rest, docstring_documents(chain(stdlib, packages), most_chars, report=report))
    return collection.documents, report


def python_files(rng: random.Random, report: SourceReport) -> list[SourceFile]:
    """Return the files of the standard library and of packages in turn, shuffled, packages taking turns too."""
    both = zip_longest(_interleave([_stdlib_files(report)], rng), _interleave(_package_files(report), rng))
    return [file for pair in both for file in pair if file]


class _Collection:
    """The documents taken so far, without repetitions."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self.documents: list[Document] = []
        self.characters = 0
        self.report = SourceReport()
        self._deduplicator = Deduplicator()
        self._on_progress = on_progress

    def take_until(self, total_chars: int, documents: Iterator[Document]) -> None:
        """Take documents until the collection holds `total_chars`; pull no more than needed."""
        while self.characters < total_chars and (document := next(documents, None)):
            if problem := self._deduplicator.repeats(document.text):
                self.report.filtered[problem] += 1
                continue
            self.documents.append(document)
            self.characters += len(document.text)
            self.report.documents[document.kind] += 1
            self.report.characters[document.kind] += len(document.text)
            self._on_progress(self.characters)


def _interleave(groups: list[list[SourceFile]], rng: random.Random) -> list[SourceFile]:
    """Shuffle within and among groups, then take turns, so that no large package fills the corpus."""
    for group in groups:
        rng.shuffle(group)
    rng.shuffle(groups)
    return [file for turn in zip_longest(*groups) for file in turn if file]


def _stdlib_files(report: SourceReport) -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (PurePath(path.relative_to(root)).as_posix() for path in _walk(root, report) if path.suffix == ".py")
    return [SourceFile(root / name, f"stdlib/{name}", "standard library") for name in sorted(names)]


def _walk(root: Path, report: SourceReport) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        report.bad.leave_out(os.path.relpath(error.filename, root.parent), str(error.strerror))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files))


def _package_files(report: SourceReport) -> list[list[SourceFile]]:
    """Return the Python files of each permissively licensed distribution except step35's own."""
    distributions = {
        name.lower(): distribution
        for distribution in importlib.metadata.distributions()
        if (name := (distribution.metadata.get_all("Name") or [""])[0]) not in ("", "step35")
    }
    packages = []
    for name, distribution in sorted(distributions.items()):
        if problem := licence_problem(distribution.metadata):
            report.packages_left_out[name] = problem
            continue
        files = sorted(
            PurePath(file).as_posix()
            for file in distribution.files or []
            if file.suffix == ".py" and not (_SKIPPED_FOLDERS | {".."}) & set(file.parts)
        )
        domain = f"python package {name}"
        packages.append([SourceFile(Path(str(distribution.locate_file(file))), file, domain) for file in files])
    return packages


def code_documents(
    files: Iterable[SourceFile], most_chars: int = _MOST_FILE_CHARS, *, report: SourceReport
) -> Iterator[Document]:
    """Yield Python files as they are, but no generated ones, tables or files longer than `most_chars`."""
    for file in files:
        text = _read(file.path, file.source, report)
        if text and not _filtered(text, most_chars, report):
            yield Document(text, "code", "python", file.domain, file.source)


def docstring_documents(
    files: Iterable[SourceFile], most_chars: int = _MOST_FILE_CHARS, *, report: SourceReport
) -> Iterator[Document]:
    """Yield the docstrings of Python files, one document a file, of at most `most_chars` characters."""
    for file in files:
        code = _read(file.path, file.source, report)
        if not code or _filtered(code, _MOST_FILE_CHARS, report):
            continue
        try:
            text = docstring_document(code, file.source)
        except (SyntaxError, ValueError, RecursionError) as error:
            report.bad.leave_out(file.source, f"not Python ({type(error).__name__})")
            continue
        if _LEAST_DOCSTRING_CHARS <= len(text) <= most_chars:
            yield Document(text, "documentation", "english", "documentation", file.source)


def _filtered(code: str, most_chars: int, report: SourceReport) -> bool:
    """Say whether a source file is generated, a table or too large, and count it."""
    lines = [line for line in code.splitlines() if line.strip()]
    reason = ""
    if len(code) > most_chars:
        reason = "too large"
    elif not lines or max(map(len, lines)) > _LONGEST_LINE_CHARS:
        reason = "empty or generated"
    elif sum(bool(_DATA_LINE.match(line)) for line in lines) > len(lines) / 2:
        reason = "mostly data"
    if reason:
        report.filtered[reason] += 1
    return bool(reason)


def _read(path: Path, name: str, report: SourceReport) -> str:
    """Return the text of a file with Unix line ends, or "" after noting in the report why there is none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        report.bad.leave_out(name, str(error.strerror or error))
        return ""
    except UnicodeDecodeError as error:
        report.bad.leave_out(name, f"not UTF-8 at byte {error.start}")
        return ""
    if "\0" in text:
        report.bad.leave_out(name, "contains null bytes")
        return ""
    return text.replace("\r\n", "\n")
