"""Prepare: what it writes, and that it resumes instead of starting over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from step35.config.data import PrepareConfig
from step35.data import mixture
from step35.data import prepare as prepare_module
from step35.data.document import Document
from step35.data.lines import BadLines
from step35.data.mixture import EncodedDocument, choose_validation
from step35.data.prepare import PreparedData, prepare
from step35.data.sources import SourceReport
from step35.errors import DataError, DiskFullError, RunLockedError
from step35.runtime.disk import fingerprint
from step35.runtime.lock import LOCK

SETTINGS = PrepareConfig(vocab_size=512, corpus_chars=40_000, val_tokens=1_500, shard_tokens=10_000, seed=3)
CONTEXT = 64


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the machine's files by made-up ones, and record which steps really run."""
    recorded: list[str] = []
    train_tokenizer, encode_mixture = prepare_module.train_tokenizer, prepare_module.encode_mixture

    def collect(budget_chars: int, seed: int, extra: Sequence[Path], **_: Any) -> Any:
        recorded.append("collect")
        rng = np.random.default_rng(seed)
        words = ["alpha", "beta", "gamma", "delta", "<|im_end|>"]
        documents = [
            Document(" ".join(rng.choice(words, size=100)), "code", "python", "made up", f"{number}.py")
            for number in range(budget_chars // 600)
        ]
        return documents, SourceReport(bad=BadLines(left_out=12, files=["x.py: Permission denied"]))

    def train(texts: Any, vocab_size: int) -> Any:
        recorded.append("tokenizer")
        return train_tokenizer(texts, vocab_size)

    def encode(*arguments: Any, **named: Any) -> Any:
        recorded.append("tokenise")
        return encode_mixture(*arguments, **named)

    monkeypatch.setattr(prepare_module, "collect", collect)
    monkeypatch.setattr(prepare_module, "train_tokenizer", train)
    monkeypatch.setattr(prepare_module, "encode_mixture", encode)
    monkeypatch.setattr(
        mixture.arithmetic, "document", lambda index, *, seed: f"{seed} + {index} is {seed + index}\n" * 3
    )
    return recorded


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_writes_documents_with_meta_line_in_the_wished_mixture(tmp_path: Path, calls: list[str]) -> None:
    data = prepare(tmp_path, SETTINGS, context=CONTEXT)
    start, end = data.train.document_starts[:2]
    first = data.train.slice(int(start), int(end - start)).tolist()
    assert first[0] == data.tokenizer.bos_id
    assert first[-1] == data.tokenizer.eos_ids[0]
    assert data.tokenizer.decode(first[1:-1]).startswith("type: ")
    total = data.train.total_tokens + data.val.total_tokens
    arithmetic = data.train.tokens_by_source["arithmetic"] + data.val.tokens_by_source["arithmetic"]
    assert arithmetic / total == pytest.approx(SETTINGS.arithmetic_share, abs=0.01)
    assert 1_400 < data.val.total_tokens < 1_800
    assert data.val.tokens_by_source["arithmetic"] / data.val.total_tokens == pytest.approx(
        SETTINGS.arithmetic_share, abs=0.05
    )
    # Kinds are interleaved: both occur in the first tenth of the stream.
    text = data.tokenizer.decode(data.train.slice(0, data.train.total_tokens // 10).tolist())
    assert "type: code" in text
    assert "type: arithmetic" in text


def test_quoted_control_tokens_stay_text(tmp_path: Path, calls: list[str]) -> None:
    data = prepare(tmp_path, SETTINGS, context=CONTEXT)
    stream = data.train.slice(0, data.train.total_tokens)
    assert data.tokenizer.id_of("<|im_end|>") not in stream
    assert "<|im_end|>" in data.tokenizer.decode(stream[:5_000].tolist())
    assert len(data.tokenizer.encode("<|im_end|>")) == 1  # the chat format still gets the token


def test_record_holds_settings_counts_report_and_baselines(tmp_path: Path, calls: list[str]) -> None:
    stages = []
    data = prepare(tmp_path, SETTINGS, lambda stage, *_: stages.append(stage), context=CONTEXT)
    record = json.loads((tmp_path / "prepare.json").read_text())
    assert record == json.loads(json.dumps(data.record))
    assert PrepareConfig.parse(record["settings"]) == SETTINGS
    assert record["sources"]["skipped"] == ["x.py: Permission denied", "and 11 more"]
    assert (record["sources"]["bad_lines"], record["sources"]["files_left_out"]) == (0, 12)
    assert record["train"]["tokens"] == data.train.total_tokens
    assert record["val"]["documents"] == len(data.val.document_starts)
    assert 0 < record["bigram_loss"] < record["unigram_loss"] < np.log(512)
    for stage in ("tokenizer", "tokenise", "arithmetic", "write train", "write val", "baselines"):
        assert stage in stages


def test_second_call_does_nothing(tmp_path: Path, calls: list[str]) -> None:
    prepare(tmp_path, SETTINGS, context=CONTEXT)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    calls.clear()
    prepare(tmp_path, SETTINGS, context=CONTEXT)
    assert calls == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_two_processes_do_not_fill_one_folder(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_mixture = prepare_module.encode_mixture

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        with pytest.raises(RunLockedError, match="is being written by process"):
            prepare(tmp_path / "out", SETTINGS, context=CONTEXT)
        return encode_mixture(*arguments, **named)

    monkeypatch.setattr(prepare_module, "encode_mixture", meanwhile)
    prepare(tmp_path / "out", SETTINGS, context=CONTEXT)
    assert calls == ["collect", "tokenizer", "tokenise"]
    monkeypatch.undo()
    # Runs know their data by this fingerprint, which no lock may change.
    assert not (tmp_path / "out" / LOCK).exists()
    before = fingerprint(tmp_path / "out")
    prepare(tmp_path / "out", SETTINGS, context=CONTEXT)
    assert fingerprint(tmp_path / "out") == before


def test_interrupted_after_the_tokenizer_reuses_it(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "encode_mixture", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "resumed", SETTINGS, context=CONTEXT)
    with pytest.raises(DataError, match="no finished data"):
        PreparedData.load(tmp_path / "resumed")
    assert calls == ["collect", "tokenizer"]
    calls.clear()
    prepare(tmp_path / "resumed", SETTINGS, context=CONTEXT)
    assert calls == ["collect", "tokenise"]
    prepare(tmp_path / "unbroken", SETTINGS, context=CONTEXT)
    assert files(tmp_path / "resumed") == files(tmp_path / "unbroken")


def test_another_context_only_computes_the_baselines_again(tmp_path: Path, calls: list[str]) -> None:
    first = prepare(tmp_path, SETTINGS, context=CONTEXT)
    calls.clear()
    second = prepare(tmp_path, SETTINGS, context=CONTEXT // 4)
    assert calls == []
    assert second.record["context"] == CONTEXT // 4
    assert second.bigram_loss != first.bigram_loss


@pytest.mark.parametrize("change", ["settings", "texts", "file"])
def test_what_shapes_the_data_starts_over(tmp_path: Path, calls: list[str], change: str) -> None:
    note = tmp_path / "note.txt"
    note.write_text("one")
    settings = SETTINGS.model_copy(update={"extra": (str(note),)})
    prepare(tmp_path / "out", settings, context=CONTEXT)
    calls.clear()
    texts = []
    if change == "settings":
        settings = settings.model_copy(update={"seed": 4})
    elif change == "texts":
        texts = ["<|im_start|>user\n"]
    else:
        note.write_text("two")
    prepare(tmp_path / "out", settings, context=CONTEXT, tokenizer_texts=texts)
    # The made-up documents do not change with the file, and so the tokenizer stays.
    assert calls == ["collect", *(["tokenizer"] if change != "file" else []), "tokenise"]


def test_deleted_shards_are_rebuilt(tmp_path: Path, calls: list[str]) -> None:
    prepare(tmp_path, SETTINGS, context=CONTEXT)
    before = files(tmp_path)
    shutil.rmtree(tmp_path / "train")
    calls.clear()
    prepare(tmp_path, SETTINGS, context=CONTEXT)
    assert calls == ["collect", "tokenise"]
    assert files(tmp_path) == before


def test_texts_of_the_caller_get_merges(tmp_path: Path, calls: list[str]) -> None:
    word = "zyxwvutsrq"
    plain = prepare(tmp_path / "plain", SETTINGS, context=CONTEXT)
    shaped = prepare(tmp_path / "shaped", SETTINGS, context=CONTEXT, tokenizer_texts=[f"{word} {word}"])
    assert len(plain.tokenizer.encode(word)) > 5
    assert len(shaped.tokenizer.encode(word)) == 1


def test_full_disk_is_explained(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module.Tokenizer, "save", full)
    with pytest.raises(DiskFullError, match="tokenizer"):
        prepare(tmp_path, SETTINGS, context=CONTEXT)


def test_validation_holds_no_copy_and_no_giant() -> None:
    def document(*ids: int) -> EncodedDocument:
        return EncodedDocument(np.array(ids, dtype=np.uint32), "code")

    encoded = [document(1, 2), document(1, 2), document(*range(50)), *(document(3, n) for n in range(100))]
    chosen = choose_validation(encoded, np.arange(len(encoded)), val_tokens=20)
    assert chosen == set(range(3, 13))
    # A tenth of the corpus at most, whatever is asked for.
    assert len(choose_validation(encoded, np.arange(len(encoded)), val_tokens=10_000)) == 13
