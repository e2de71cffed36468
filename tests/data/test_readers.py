"""Readers: every format, every kind of bad line, and every way in which a file may be damaged."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.data.document import Document
from step35.data.lines import BadLines, zstd
from step35.data.mixture import encode_documents
from step35.data.readers import read_documents
from step35.data.shards import ShardWriter
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

RECORDS = [{"text": f"text number {n}", "language": "german", "kind": " news\n"} for n in range(50)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def read(*paths: Path, limit: int = 0, text_field: str = "text") -> tuple[list[Document], BadLines]:
    bad = BadLines(limit)
    return list(read_documents(paths, bad, domain="web", text_field=text_field)), bad


def write_jsonl(path: Path) -> None:
    path.write_bytes(LINES)


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(LINES))


def write_zst(path: Path) -> None:
    path.write_bytes(
        zstd().compress(LINES[:1_000]) + zstd().compress(LINES[1_000:])
    )  # two frames, as parallel writers do


def write_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=20)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.jsonl.gz", write_gz), ("a.jsonl.zst", write_zst), ("a.parquet", write_parquet)],
)
def test_all_record_formats_give_the_same_documents(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    documents, bad = read(tmp_path / name)
    assert [document.text for document in documents] == [record["text"] for record in RECORDS]
    assert documents[7].meta == f"type: news | language: german | domain: web | source: {name}"
    assert bad.count == 0


def test_a_folder_is_read_in_order_of_names_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.py").write_bytes(b"\xef\xbb\xbfprint(1)\r\n")
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"# title\n"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "linked.md.gz").symlink_to(tmp_path / "a.md.gz")
    documents, bad = read(tmp_path)
    assert [(one.text, one.kind, one.language) for one in documents] == [
        ("# title\n", "text", "unknown"),
        ("print(1)\n", "code", "python"),
        ("# title\n", "text", "unknown"),
    ]
    assert documents[1].source == f"{tmp_path.name}/b/x.py"
    assert bad.left_out == 3
    assert [file.removeprefix(f"{tmp_path}/")[:20] for file in bad.files] == [
        "circle: a link to a ",
        "gone.txt: No such fi",
        "picture.png: suffix ",
    ]
    assert bad.count == 0


def test_a_long_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(250_000))
    (tmp_path / "long.txt").write_text(text)
    documents, _ = read(tmp_path / "long.txt")
    assert len(documents) == 3
    assert all(document.text.endswith("\n") for document in documents)
    assert "".join(document.text for document in documents) == text
    (tmp_path / "long.txt").write_bytes(text.replace("line 200000\n", "line \udcff\n").encode(errors="surrogateescape"))
    documents, bad = read(tmp_path / "long.txt", limit=1)
    assert len(documents) == 2
    assert "long.txt: not UTF-8 in line 200001: line" in bad.quotes[0]


BAD_LINES = {
    b'{"text": "cut o': "not JSON",
    b'{"body": "x"}': "not an object with a text in field 'text'",
    b'{"text": 3}': "not an object with a text in field 'text'",
    b"[1]": "not an object with a text in field 'text'",
    b'{"text": " "}': "empty text",
    b"": "empty line",
    b'{"text": "\xff"}': "not UTF-8",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_counted_and_quoted_with_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good too"}\n')
    documents, bad = read(path, limit=1)
    assert [document.text for document in documents] == ["good", "good too"]
    assert bad.count == 1
    [quote] = bad.quotes
    assert quote.startswith(f"{path}:2: {BAD_LINES[line]}")
    assert len(quote) < 300


def test_one_bad_line_too_many_is_an_error_that_lists_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 5)
    with pytest.raises(DataError, match="max_bad_lines=3") as error:
        read(path, limit=3)
    assert f"{path}:1: " in str(error.value)
    assert f"{path}:4: " in str(error.value)
    assert read(path, limit=5)[1].count == 5


def test_text_that_is_not_utf8_or_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"o\rn\re\ntwo \xff\nthree\n")
    (tmp_path / "b.txt").write_bytes(b"first\na\0b\n")
    (tmp_path / "c.txt").write_bytes(b" \n")
    documents, bad = read(tmp_path, limit=3)
    assert documents == []
    assert [quote.removeprefix(f"{tmp_path}/") for quote in bad.quotes] == [
        "a.txt: not UTF-8 in line 2: two \ufffd",  # a line ends at its line feed
        "b.txt: contains null bytes in line 2: a\0b",
        "c.txt: empty text: ",
    ]


def test_the_line_that_is_not_utf8_is_named_behind_a_byte_order_mark_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\n\xffcd")
    assert read(tmp_path, limit=1)[1].quotes == [f"{tmp_path / 'a.txt'}: not UTF-8 in line 2: \ufffdcd"]


def test_empty_files_are_left_out_counted_and_named(tmp_path: Path) -> None:
    contents = {"a.txt": b"", "b.jsonl": b"", "c.jsonl.gz": gzip.compress(b""), "d.jsonl.zst": zstd().compress(b"")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    documents, bad = read(tmp_path)
    assert documents == []
    assert bad.left_out == 4
    assert bad.files == [f"{tmp_path / name}: empty" for name in contents]


def test_many_files_are_counted_and_ten_are_named(tmp_path: Path) -> None:
    for number in range(57):
        (tmp_path / f"{number:02}.png").write_bytes(b"x")
    _, bad = read(tmp_path)
    assert bad.left_out == 57
    assert len(bad.files) == 10


@pytest.mark.parametrize(("name", "write"), [("a.jsonl.gz", write_gz), ("a.jsonl.zst", write_zst)])
@pytest.mark.parametrize("damage", ["truncated", "changed", "replaced"])
def test_damaged_archives_are_named_with_how_far_they_go(
    tmp_path: Path, name: str, write: Callable[[Path], None], damage: str
) -> None:
    path = tmp_path / name
    write(path)
    content = path.read_bytes()
    changed = bytes(byte ^ 255 for byte in content[60:80])
    damaged = {
        "truncated": content[: len(content) * 2 // 3],
        "changed": content[:60] + changed + content[80:],
        "replaced": b"plain text\n",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=rf"{name} can be read up to line \d+ \([\d,]+ bytes of text\)"):
        read(path, limit=1_000)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_corrupt_parquet_file_is_named(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DataError, match=r"a\.parquet can be read up to row 0"):
        read(path)


def test_a_corrupt_page_says_how_many_rows_came_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"text": f"{n} " * 300} for n in range(2_000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500, use_dictionary=False)
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half : half + 5_000] = b"\xaa" * 5_000
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet can be read up to row [1-9]\d* and no further"):
        read(path, limit=100)


def test_parquet_rows_without_text_are_bad_and_a_missing_column_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x", None, ""], "n": [1, 2, 3]}), path)
    documents, bad = read(path, limit=2, text_field="body")
    assert [document.text for document in documents] == ["x"]
    assert [quote.split(": ")[1] for quote in bad.quotes] == ["not an object with a text in field 'body'", "empty text"]
    with pytest.raises(DataError, match=r"no column 'text'; set text_field to one of \['body', 'n'\]"):
        read(path)


@pytest.mark.parametrize(("name", "message"), [("gone.txt", "does not exist"), ("a.docx", "no known kind")])
def test_paths_that_cannot_be_read_are_errors(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(("suffix", "module"), [("jsonl.zst", "backports"), ("parquet", "pyarrow")])
def test_a_missing_library_names_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str
) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'step35\[data\]'"):
        read(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        ["type: text | language: unknown | domain: x | source: a.py\nsome words, some words"] * 3, 400
    )


def write_shards(folder: Path, tokenizer: Tokenizer, documents: list[Document]) -> list[list[int]]:
    encoded = encode_documents(tokenizer, documents)
    with ShardWriter(folder, tokenizer.vocab_size) as writer:
        for document in encoded:
            writer.add(document.ids, "x", meta_tokens=document.meta_tokens)
    return [document.ids.tolist() for document in encoded]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=5))
def test_token_shards_give_back_their_documents(
    texts: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("data")
    tokenizer.save(out / "tokenizer")
    documents = [Document(text, "code", "c", "home | garden", f"{n}.c") for n, text in enumerate(texts)]
    ids = write_shards(out / "sources" / "one", tokenizer, documents)
    found, _ = read(out)
    assert [document.text for document in found] == texts
    assert [document.ids.tolist() for document in encode_documents(tokenizer, found)] == ids


def test_shards_without_a_tokenizer_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(tmp_path / "lonely", tokenizer, [Document("x", "a", "b", "c", "d")])
    with pytest.raises(DataError, match="no tokenizer/ beside or above"):
        read(tmp_path / "lonely")


def test_shards_of_another_tokenizer_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(tmp_path / "sources" / "one", tokenizer, [Document("x", "a", "b", "c", "d")])
    other = train_tokenizer(["nothing of what the other one has seen"] * 3, 300)
    other.save(tmp_path / "tokenizer")
    with pytest.raises(
        DataError, match=rf"shards of {tokenizer.vocab_size} tokens, but .*tokenizer has {other.vocab_size}"
    ):
        read(tmp_path / "sources")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "txt"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    packers = {"jsonl.gz": gzip.compress, "jsonl.zst": zstd().compress}
    path = tmp_path / f"a.{suffix}"
    line = json.dumps({"text": "some words " * 100}).encode() + b"\n"
    path.write_bytes(packers.get(suffix, bytes)(line * 9_000))  # 10 MB
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_documents([path], BadLines(0), domain="web"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == (11 if suffix == "txt" else 9_000)
    assert peak < 6_000_000
