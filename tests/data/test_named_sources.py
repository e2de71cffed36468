"""Named sources: one folder of shards each, no copy of validation in training, and what a second call does."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest

from step35.config.data import PrepareConfig, SourceConfig
from step35.data import builtin, mixture
from step35.data import prepare as prepare_module
from step35.data.builtin import BUILTIN, builtin_documents
from step35.data.document import Document
from step35.data.lines import BadLines
from step35.data.mixture import EncodedDocument, encode_documents, full_text
from step35.data.prepare import PreparedData, prepare
from step35.data.sampler import MixtureLoader
from step35.data.shards import TokenShards
from step35.data.source_shards import HeldBack
from step35.data.sources import SourceFile
from step35.data.steps import key_of
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.errors import ConfigError, DataError

CONTEXT = 64


@pytest.fixture
def settings(tmp_path: Path) -> PrepareConfig:
    """Two files of made-up text with copies and bad lines, and procedural arithmetic."""
    draw = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    texts = [" ".join(draw.choice(words, 20)) for _ in range(150)]
    texts += texts[:50]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[10] = "{broken"
    (tmp_path / "web.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "notes").mkdir()
    for number in range(40):
        (tmp_path / "notes" / f"{number:02}.md").write_text(f"# note {number}\n\n" + " ".join(draw.choice(words, 30)))
    toml = f"""
        vocab_size = 600
        val_tokens = 6_000
        [[sources]]
        name = "web"
        paths = ["{tmp_path / "web.jsonl"}"]
        [[sources]]
        name = "notes"
        paths = ["{tmp_path / "notes"}"]
        [[sources]]
        name = "sums"
        builtin = "arithmetic"
        chars = 20_000
    """
    return PrepareConfig.parse(tomllib.loads(toml))


def documents_of(shards: TokenShards) -> list[tuple[int, ...]]:
    return [tuple(ids.tolist()) for ids in shards.documents()]


def test_each_source_gets_its_own_shards_and_the_account_adds_up(tmp_path: Path, settings: PrepareConfig) -> None:
    data = prepare(tmp_path / "out", settings, context=CONTEXT)
    assert list(data.sources) == ["web", "notes", "sums"]
    for name, shards in data.sources.items():
        shards.verify()
        counts = data.record["named"][name]
        val = TokenShards(tmp_path / "out" / "sources" / name / "val")
        assert counts["documents"] == len(shards.document_starts)
        assert counts["tokens"] == shards.total_tokens
        assert counts["val_documents"] == len(val.document_starts) > 0
        assert data.val.tokens_by_source[name] == val.total_tokens
    web = data.record["named"]["web"]
    assert web["documents"] + web["val_documents"] + web["copies_of_val"] == 199
    assert web["bad_lines"] == 1
    assert web["quotes"][0].startswith(f"{tmp_path / 'web.jsonl'}:11: not JSON")
    assert data.record["sources"]["skipped"] == web["quotes"]
    assert data.bigram_loss < data.unigram_loss
    with pytest.raises(DataError, match="holds the sources web, notes, sums"):
        _ = data.train


def test_all_that_is_left_out_is_counted_though_ten_are_named(tmp_path: Path, settings: PrepareConfig) -> None:
    with (tmp_path / "web.jsonl").open("a") as web:
        web.write("{broken\n" * 56)
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG")
    sources = prepare(tmp_path / "out", settings, context=CONTEXT).record["sources"]
    assert (sources["bad_lines"], sources["files_left_out"]) == (57, 1)
    assert len(sources["skipped"]) == 12
    assert sources["skipped"][10].startswith(f"{tmp_path / 'notes' / 'picture.png'}: suffix")
    assert sources["skipped"][-1] == "and 47 more"


def test_training_holds_no_copy_of_validation(tmp_path: Path, settings: PrepareConfig) -> None:
    data = prepare(tmp_path / "out", settings, context=CONTEXT)
    held_back = set(documents_of(data.val))
    assert held_back
    assert data.record["named"]["web"]["copies_of_val"] > 0
    assert not held_back & {document for shards in data.sources.values() for document in documents_of(shards)}


def test_prepared_sources_train_a_mixture_with_masked_metadata(tmp_path: Path, settings: PrepareConfig) -> None:
    data = prepare(tmp_path / "out", settings, context=CONTEXT)
    weights = {"web": 0.5, "sums": 0.5}
    loader = MixtureLoader(data.sources, weights, context=CONTEXT, seed=0, window_rows=32, mask_meta_from=0)
    batch = loader.rows(0, 32)
    masked = (~batch.targets) & (np.diff(batch.segments, prepend=-1) == 0)
    text = data.tokenizer.decode(batch.tokens[masked].tolist())
    assert "type: text | language: unknown" in text
    assert "alpha" not in text


def test_the_meta_tokens_are_bos_and_the_line_with_its_newline() -> None:
    tokenizer = train_tokenizer(["type: text | language: x\n\n\n  words (words)\n"] * 5, 400)
    texts = ["words", "\n\n  words", " words", "(\n", "\n", "é\ud800"]
    documents = [Document(text, "text", "x", "y", source) for text in texts for source in ("a.py", "a(b)", "ü")]
    for document, encoded in zip(documents, encode_documents(tokenizer, documents), strict=True):
        ids = encoded.ids.tolist()
        plain = tokenizer.backend.encode(full_text(document).replace("\ud800", "?"), add_special_tokens=False).ids
        assert ids == [tokenizer.bos_id, *plain, tokenizer.eos_ids[0]]
        head = ids[1 : encoded.meta_tokens]
        assert tokenizer.decode(head).startswith(f"{document.meta}\n")
        assert not tokenizer.decode(head[:-1]).startswith(f"{document.meta}\n")


def test_a_second_call_does_nothing_and_an_interrupted_one_goes_on_behind_the_finished_source(
    tmp_path: Path, settings: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source, written = prepare_module.write_source, []

    def interrupted(folder: Path, source: SourceConfig, *rest: object) -> dict[str, object]:
        if source.name == "notes" and "notes" not in written:
            written.append("notes")
            raise KeyboardInterrupt
        written.append(source.name)
        return write_source(folder, source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module, "write_source", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(out, settings, context=CONTEXT)
    with pytest.raises(DataError, match="no finished data"):
        PreparedData.load(out)
    resumed = prepare(out, settings, context=CONTEXT)
    assert written == ["web", "notes", "notes", "sums"]
    prepare(out, settings, context=CONTEXT)
    assert written == ["web", "notes", "notes", "sums"]
    unbroken = prepare(tmp_path / "unbroken", settings, context=CONTEXT)
    assert resumed.record == unbroken.record
    for name in settings.sources:
        assert documents_of(resumed.sources[name.name]) == documents_of(unbroken.sources[name.name])


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record which sources are written, and which tokenizers trained; the sample is short."""
    found: list[str] = []
    write_source, train_tokenizer = prepare_module.write_source, prepare_module.train_tokenizer

    def write(folder: Path, source: SourceConfig, *rest: object) -> dict[str, object]:
        found.append(source.name)
        return write_source(folder, source, *rest)  # type: ignore[arg-type]

    def train(texts: list[str], vocab_size: int) -> Tokenizer:
        found.append("tokenizer")
        return train_tokenizer(texts, vocab_size)

    monkeypatch.setattr(prepare_module, "write_source", write)
    monkeypatch.setattr(prepare_module, "train_tokenizer", train)
    monkeypatch.setattr(prepare_module, "_SAMPLE_CHARS", 6_000)
    return found


def with_change(settings: PrepareConfig, name: str, **change: object) -> PrepareConfig:
    changed = [source.model_copy(update=change if source.name == name else {}) for source in settings.sources]
    return settings.model_copy(update={"sources": tuple(changed)})


def test_times_and_limits_of_bad_lines_change_nothing(
    tmp_path: Path, settings: PrepareConfig, written: list[str]
) -> None:
    out = tmp_path / "out"
    prepare(out, settings, context=CONTEXT)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    os.utime(tmp_path / "web.jsonl", (1, 1))
    prepare(out, with_change(settings, "web", max_bad_lines=7), context=CONTEXT)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_source_is_kept_when_another_one_changes(tmp_path: Path, settings: PrepareConfig, written: list[str]) -> None:
    out = tmp_path / "out"
    prepare(out, settings, context=CONTEXT)
    assert written == ["tokenizer", "web", "notes", "sums"]
    written.clear()
    (tmp_path / "notes" / "99.md").write_text("A note behind what the tokenizer is trained on.")
    prepare(out, settings, context=CONTEXT)
    assert written == ["notes"]
    settings = with_change(settings, "sums", chars=25_000)
    again = prepare(out, settings, context=CONTEXT)
    assert written == ["notes", "sums"]
    anew = prepare(tmp_path / "anew", settings, context=CONTEXT)
    assert again.record == anew.record
    assert (out / "steps.json").read_text() == (tmp_path / "anew" / "steps.json").read_text()
    assert documents_of(again.val) == documents_of(anew.val)


def test_a_change_at_the_start_of_a_source_trains_another_tokenizer_for_all(
    tmp_path: Path, settings: PrepareConfig, written: list[str]
) -> None:
    prepare(tmp_path / "out", settings, context=CONTEXT)
    written.clear()
    (tmp_path / "notes" / "00.md").write_text("Ein anderer Anfang, der andere Paare hat. " * 9)
    prepare(tmp_path / "out", settings, context=CONTEXT)
    assert written == ["tokenizer", "web", "notes", "sums"]


def test_a_stop_while_a_tokenizer_is_replaced_leaves_no_mixture(
    tmp_path: Path, settings: PrepareConfig, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> dict[str, object]:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    first = prepare(out, settings, context=CONTEXT)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_source", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(out, settings, context=CONTEXT, tokenizer_texts=["another word, another word"])
    again = prepare(out, settings, context=CONTEXT)
    assert again.record == first.record
    assert again.tokenizer.encode("another") == first.tokenizer.encode("another")


def test_the_key_of_settings_without_sources_is_what_it_was_before_there_were_any() -> None:
    settings = PrepareConfig(seed=5)
    before = json.dumps([1, settings.model_dump(exclude={"sources"}), [], []])
    assert key_of(settings, []) == hashlib.sha256(before.encode()).hexdigest()


def test_too_many_bad_lines_and_empty_sources_stop_prepare(tmp_path: Path, settings: PrepareConfig) -> None:
    strict = [source.model_copy(update={"max_bad_lines": 0}) for source in settings.sources]
    with pytest.raises(DataError, match=r"max_bad_lines=0.*\n.*web\.jsonl:11: not JSON"):
        prepare(tmp_path / "out", settings.model_copy(update={"sources": tuple(strict)}), context=CONTEXT)
    (tmp_path / "void").mkdir()
    void = SourceConfig(name="void", paths=(str(tmp_path / "void"),))
    with pytest.raises(DataError, match="source 'void' holds no documents"):
        prepare(tmp_path / "out", settings.model_copy(update={"sources": (*settings.sources, void)}), context=CONTEXT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [{"name": "a"}]}, "either paths or builtin"),
        ({"sources": [{"name": "a", "paths": ["x"], "builtin": "code", "chars": 1}]}, "either paths or builtin"),
        ({"sources": [{"name": "a", "builtin": "code"}]}, "needs chars"),
        ({"sources": [{"name": "../a", "paths": ["x"]}]}, "name"),
        ({"sources": [{"name": "a", "paths": ["x"]}] * 2}, "a name of its own"),
        ({"sources": [{"name": "a", "paths": ["x"]}], "arithmetic_share": 0.1}, "arithmetic_share=0.1 cannot take"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrepareConfig.parse(change)


def test_the_built_in_corpora_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(builtin_documents("arithmetic", 1, BadLines())) == next(mixture.arithmetic_documents(1))
    with pytest.raises(ConfigError, match=r"builtin='arithmetik'\. Did you mean 'arithmetic'"):
        builtin_documents("arithmetik", 0, BadLines())
    monkeypatch.setitem(BUILTIN, "one", lambda seed, bad: iter([Document("x", "a", "b", "c", str(seed))]))
    assert [document.source for document in builtin_documents("one", 7, BadLines())] == ["7"]


def test_a_file_gives_either_its_code_or_its_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SourceFile(tmp_path / f"{n}.py", f"{n}.py", "x") for n in range(60)]
    for n, file in enumerate(files):
        file.path.write_text(f'"""Module {n}. {f"It says {n} and more. " * 20}"""\nnumber = {n}\n')
    monkeypatch.setattr(builtin, "python_files", lambda rng, report: files)
    code = {document.source for document in builtin_documents("code", 0, BadLines())}
    prose = {document.source for document in builtin_documents("documentation", 0, BadLines())}
    assert not code & prose
    assert len(code | prose) == 60
    assert len(prose) > 10


def test_what_a_built_in_corpus_cannot_read_is_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [SourceFile(tmp_path / f"{n}.py", f"{n}.py", "x") for n in range(60)]
    for file in files:
        file.path.write_bytes(b"number = '\xff'\n")
    monkeypatch.setattr(builtin, "python_files", lambda rng, report: files)
    found = {name: BadLines(0) for name in ("code", "documentation")}
    for name, bad in found.items():
        assert list(builtin_documents(name, 0, bad)) == []
        assert all("not UTF-8" in file for file in bad.files)
        assert len(bad.files) == 10
    assert sum(bad.left_out for bad in found.values()) == 60


def test_copies_get_the_same_side_whatever_their_meta_line() -> None:
    def document(*ids: int) -> EncodedDocument:
        return EncodedDocument(np.array(ids, dtype=np.uint32), "", meta_tokens=1)

    held_back = HeldBack(100)
    sides = {n: held_back.side(document(1, n)) for n in range(600)}
    assert sum(side == "val" for side in sides.values()) == 50  # of two tokens each
    again = {n: held_back.side(document(2, n)) for n in range(600)}
    assert all(again[n] == ("copy" if side == "val" else "train") for n, side in sides.items())
    assert {HeldBack(100).side(document(1, *range(n, n + 30))) for n in range(100)} == {"train"}  # too long


def test_a_long_meta_line_does_not_part_the_copies_of_a_text() -> None:
    def side(held_back: HeldBack, n: int, meta_tokens: int) -> str:
        return held_back.side(EncodedDocument(np.array([9] * meta_tokens + [n]), "", meta_tokens))

    held_back = HeldBack(100)
    with_long_meta = [side(held_back, n, 40) for n in range(200)]
    with_short_meta = [side(held_back, n, 1) for n in range(200)]
    assert {"val", "train"} == set(with_long_meta)
    assert with_short_meta == ["copy" if found == "val" else "train" for found in with_long_meta]


def test_a_source_of_one_text_trains_on_it() -> None:
    for n in range(100):
        held_back = HeldBack(100)
        document = EncodedDocument(np.array([1, n]), "", meta_tokens=1)
        assert [held_back.side(document) for _ in range(3)] == ["train"] * 3


def test_a_folder_of_today_opens_as_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(f"number {n} " * 5, "code", "python", "x", f"{n}.py") for n in range(60)]
    monkeypatch.setattr(prepare_module, "collect", lambda *_, **__: (documents, prepare_module.SourceReport()))
    data = prepare(tmp_path, PrepareConfig(vocab_size=512, val_tokens=5_000, corpus_chars=20_000), context=CONTEXT)
    assert list(data.sources) == ["corpus"]
    assert data.train is data.sources["corpus"]
    for shards in (data.train, data.val):
        assert shards.meta_tokens is not None
        line = data.tokenizer.decode(shards.slice(1, int(shards.meta_tokens[0]) - 1).tolist())
        assert line.startswith("type: ")
        assert line.endswith("\n")
