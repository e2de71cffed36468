"""Sources: what is taken, what is left out and named, and that the sampling is reproducible."""

from __future__ import annotations

import gzip
import sysconfig
from email.message import Message
from pathlib import Path

import pytest

from step35.data import sources
from step35.data.dedup import Deduplicator
from step35.data.docstrings import docstring_document
from step35.data.document import Document
from step35.data.licences import licence_problem
from step35.data.sources import collect
from step35.errors import DataError

CODE = "\n".join(f"def function_{number}(value):\n    return value + {number}" for number in range(20))


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files and no packages."""
    root = tmp_path / "lib"
    (root / "json").mkdir(parents=True)
    (root / "test").mkdir()
    (root / "json" / "decoder.py").write_text(CODE)
    (root / "test" / "hidden.py").write_text(CODE.replace("value", "hidden"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    monkeypatch.setattr(sources.importlib.metadata, "distributions", list)
    return root


def metadata(**fields: str | list[str]) -> Message:
    message = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            message[name.replace("_", "-")] = value
    return message


def test_meta_line_names_type_language_domain_and_source() -> None:
    document = Document("x", "code", "python", "standard library", "stdlib/a.py")
    assert document.meta == ("type: code | language: python | domain: standard library | source: stdlib/a.py")


def test_stdlib_files_have_relative_names_and_tests_are_skipped(small_world: Path) -> None:
    documents, report = collect(100_000, 0)
    assert [document.source for document in documents] == ["stdlib/json/decoder.py"]
    assert report.characters["code"] == len(CODE)
    assert report.record()["skipped"] == []


def test_unreadable_files_are_counted_and_named(small_world: Path) -> None:
    (small_world / "gone.py").symlink_to(small_world / "nowhere.py")
    (small_world / "latin.py").write_bytes(b"name = '\xff'\n" + CODE.encode())
    (small_world / "nulls.py").write_bytes(CODE.encode() + b"\0")
    documents, report = collect(100_000, 0)
    assert len(documents) == 1
    assert sorted(line.partition(":")[0] for line in report.bad.files) == [
        "stdlib/gone.py",
        "stdlib/latin.py",
        "stdlib/nulls.py",
    ]
    assert "stdlib/latin.py: not UTF-8 at byte 8" in report.bad.files


def test_tables_and_large_files_are_filtered_and_counted(small_world: Path) -> None:
    (small_world / "table.py").write_text("TABLE = [\n" + "    0x41, 'A',\n" * 200 + "]\n")
    (small_world / "large.py").write_text("".join(f"number_{n} = other_{n}\n" for n in range(12_000)))
    documents, report = collect(100_000, 0)
    assert len(documents) == 1
    assert report.filtered == {"mostly data": 1, "too large": 1}


def test_copies_and_near_copies_are_taken_once(small_world: Path) -> None:
    (small_world / "spaced.py").write_text(CODE.replace("\n", "\n\n"))
    (small_world / "touched.py").write_text(CODE + "\nlast_line = function_3(4)\n")
    documents, report = collect(100_000, 0)
    assert len(documents) == 1
    assert sum(report.filtered.values()) == 2
    assert "exact duplicate" in report.filtered


def test_real_collection_is_reproducible_mixed_and_within_budget() -> None:
    documents, report = collect(100_000, 7)
    assert documents == collect(100_000, 7)[0]
    assert documents != collect(100_000, 8)[0]
    assert 100_000 <= sum(report.characters.values()) < 110_000
    assert 0.1 < report.characters["documentation"] / 100_000 < 0.25
    stdlib = sum(len(document.text) for document in documents if document.domain == "standard library")
    assert 0.55 < stdlib / 100_000 < 0.7
    assert not any(Path(document.source).is_absolute() for document in documents)
    code = {document.source for document in documents if document.kind == "code"}
    assert code.isdisjoint(document.source for document in documents if document.kind == "documentation")


def test_extra_folder_comes_first_and_bad_lines_are_named(small_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "note.md").write_text("A note about the weather in spring.")
    (folder / "tests").mkdir()
    (folder / "tests" / "kept.txt").write_text("Only packages lose their tests.")
    lines = ['{"text": "a good record"}', "{broken", '{"title": 1}', "", "[1]"]
    (folder / "records.jsonl").write_text("\n".join(lines))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    documents, report = collect(100_000, 0, [folder])
    assert [d.source for d in documents[:3]] == ["mine/note.md", "mine/records.jsonl", "mine/tests/kept.txt"]
    assert documents[0].kind == "text"
    assert documents[1].text == "a good record"
    assert [line.removeprefix(f"{folder}/")[:20] for line in report.bad.files] == ["picture.png: suffix "]
    named = [line.removeprefix(f"{folder}/") for line in report.bad.quotes]
    assert [line[: len("records.jsonl:2:")] for line in named] == [
        "records.jsonl:2:",
        "records.jsonl:3:",
        "records.jsonl:4:",
        "records.jsonl:5:",
    ]


def test_bad_lines_of_the_users_files_are_counted_without_end_and_quoted_ten_times(
    small_world: Path, tmp_path: Path
) -> None:
    deep, many = tmp_path / "deep.jsonl", tmp_path / "many.jsonl.gz"
    deep.write_bytes(b"[" * 100_000 + b'\n{"text": "a good record"}\n')
    many.write_bytes(gzip.compress(b"{broken\n" * 100_000))
    documents, report = collect(100_000, 0, [deep, many])
    assert documents[0].text == "a good record"
    assert report.bad.count == 100_001
    assert len(report.bad.quotes) == 10
    assert report.record()["skipped"][-1] == "and 99,991 more"


def test_a_long_text_of_the_user_is_read_no_further_than_needed(small_world: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("".join(f"line {number}\n" for number in range(250_000)))
    documents, _ = collect(100_000, 0, [tmp_path / "long.txt"])
    assert len(documents) == 1
    assert len(documents[0].text) < 1_100_000


def test_missing_extra_path_is_an_error(small_world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no_such_folder"):
        collect(100_000, 0, [tmp_path / "no_such_folder"])


def test_docstrings_stand_under_dotted_names() -> None:
    code = '"""Top."""\nclass A:\n    """Class."""\n    async def run(self):\n        """Run it."""\n'
    text = docstring_document(code, "pkg/inner/__init__.py")
    assert text == "pkg.inner\n\nTop.\n\npkg.inner.A\n\nClass.\n\npkg.inner.A.run\n\nRun it."
    assert docstring_document("x = 1", "stdlib/json/tool.py") == ""


def test_deduplicator_keeps_different_documents() -> None:
    deduplicator = Deduplicator()
    other = CODE.replace("function_1", "procedure_1").replace("value", "argument")
    assert deduplicator.repeats(CODE) == ""
    assert deduplicator.repeats(other) == ""
    assert deduplicator.repeats(CODE) == "exact duplicate"
    # Half of the lines shared is no copy.
    assert deduplicator.repeats(CODE[: len(CODE) // 2] + other[len(other) // 2 :].upper()) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"License_Expression": "MIT"},
        {"License_Expression": "(Apache-2.0 WITH LLVM-exception) AND BSD-3-Clause"},
        {"License": "BSD 3-Clause License\n\nCopyright"},
        {"Classifier": ["Topic :: Internet", "License :: OSI Approved :: Apache Software License"]},
        {
            "License": "A simple implementation licence",
            "Classifier": "License :: OSI Approved :: MIT License",
        },
    ],
)
def test_permissive_licences_pass(fields: dict[str, str | list[str]]) -> None:
    assert licence_problem(metadata(**fields)) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"License_Expression": "MIT OR GPL-3.0-only"},
        {"License_Expression": "LicenseRef-Proprietary"},
        {"License": "MPL-2.0 AND MIT"},
        {"License": "LGPLv3"},
        {"License": "MIT", "Classifier": "License :: OSI Approved :: GNU General Public License v2 (GPLv2)"},
        {"License": "see the file"},
    ],
)
def test_other_licences_are_left_out(fields: dict[str, str | list[str]]) -> None:
    assert licence_problem(metadata(**fields))
