"""Builds what pre-training reads: a tokenizer, token shards for training and validation, and their baselines.

The steps are collect, tokenizer, tokenise, write, baselines. A finished tokenizer and finished shards are
reused after an interruption (`steps.json`); `prepare.json` comes last, and then a second call does nothing.
Validation holds whole documents of the training mixture, none of which training has a copy of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from step35.config.data import PrepareConfig
from step35.data.baselines import unigram_bigram
from step35.data.loader import validation
from step35.data.mixture import (
    EncodedDocument,
    Progress,
    arithmetic_documents,
    choose_validation,
    encode_mixture,
    full_text,
)
from step35.data.shards import ShardWriter, TokenShards
from step35.data.sources import Document, SourceReport, collect
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.errors import DataError
from step35.runtime.disk import disk_errors, write_text

_VERSION = 1
_SAMPLE_CHARS = 3_000_000
_SAMPLE_ARITHMETIC_DOCUMENTS = 2_000
_SAMPLE_EXTRA_SHARE = 0.05
"""The caller's texts are repeated to this share of the sample, enough for their words to get merges."""

_STEP_FILES = {"tokenizer": ["tokenizer/tokenizer.json"], "shards": ["train/index.json", "val/index.json"]}
"""A step only counts as finished while these exist, so deleting a damaged folder rebuilds it."""


@dataclass(frozen=True)
class PreparedData:
    """What `prepare` left in a folder."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenShards
    val: TokenShards
    unigram_loss: float
    """Validation loss of a unigram model, nats per token."""
    bigram_loss: float
    """Validation loss of a bigram model, nats per token."""
    record: dict[str, Any]
    """The content of `prepare.json`."""

    @classmethod
    def load(cls, folder: Path) -> PreparedData:
        """Open a finished folder; raises `DataError` when it is unfinished or damaged."""
        record = _read_record(folder / "prepare.json")
        if not record:
            raise DataError(f"{folder} holds no finished data (no prepare.json); run `step35 prepare`.")
        return cls(
            folder,
            Tokenizer.load(folder / "tokenizer"),
            TokenShards(folder / "train"),
            TokenShards(folder / "val"),
            record["unigram_loss"],
            record["bigram_loss"],
            record,
        )


def prepare(
    out: Path,
    settings: PrepareConfig,
    progress: Progress = lambda stage, done, total, figure: None,
    *,
    context: int = 256,
    tokenizer_texts: Sequence[str] = (),
) -> PreparedData:
    """Fill `out`, or finish filling it, or just open it when it was filled with the same settings.

    `context` is the row length of the baselines. `tokenizer_texts` (for example rendered chats) shape the
    vocabulary but are not in the corpus. Raises `DataError` and `DiskFullError`.
    """
    key = _key(settings, tokenizer_texts)
    steps = _Steps(out, key)
    former = _read_record(out / "prepare.json")
    if steps.result("shards") and former.get("key") == key and former.get("context") == context:
        return PreparedData.load(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    (out / "prepare.json").unlink(missing_ok=True)
    corpus = steps.result("shards") or _build_corpus(out, settings, tokenizer_texts, steps, progress)
    unigram_loss, bigram_loss = _baselines(out, context, progress)
    record = {
        "version": _VERSION,
        "key": key,
        "settings": settings.model_dump(),
        "context": context,
        "unigram_loss": unigram_loss,
        "bigram_loss": bigram_loss,
        **corpus,
    }
    _write_record(out / "prepare.json", record)
    return PreparedData.load(out)


class _Steps:
    """Remembers on disk which steps are done, as long as the settings and the files stay."""

    def __init__(self, out: Path, key: str) -> None:
        record = _read_record(out / "steps.json")
        self._out = out
        self._record: dict[str, Any] = record if record.get("key") == key else {"key": key}

    def result(self, step: str) -> dict[str, Any]:
        """Return what a finished step left behind, or an empty dictionary."""
        if not all((self._out / file).is_file() for file in _STEP_FILES[step]):
            return {}
        return dict(self._record.get(step, {}))

    def finish(self, step: str, result: dict[str, Any]) -> None:
        self._record[step] = result
        _write_record(self._out / "steps.json", self._record)


def _build_corpus(
    out: Path, settings: PrepareConfig, tokenizer_texts: Sequence[str], steps: _Steps, progress: Progress
) -> dict[str, Any]:
    """Run the steps from collecting to the shards; return the counts for `prepare.json`."""
    documents, report = _collect(settings, progress)
    if steps.result("tokenizer"):
        tokenizer = Tokenizer.load(out / "tokenizer")
    else:
        sample = list(_tokenizer_sample(documents, tokenizer_texts, settings))
        tokenizer = _train_tokenizer(out / "tokenizer", sample, settings.vocab_size, progress)
        steps.finish("tokenizer", {"vocab_size": tokenizer.vocab_size})
    encoded = encode_mixture(
        tokenizer,
        documents,
        arithmetic_share=settings.arithmetic_share,
        seed=settings.seed,
        progress=progress,
    )
    counts = _write_shards(out, tokenizer.vocab_size, encoded, settings, progress)
    corpus = {"vocab_size": tokenizer.vocab_size, **counts, "sources": vars(report)}
    steps.finish("shards", corpus)
    return corpus


def _collect(settings: PrepareConfig, progress: Progress) -> tuple[list[Document], SourceReport]:
    total = settings.corpus_chars

    def on_progress(characters: int) -> None:
        progress("collect", min(characters, total), total, f"{characters / 1e6:.1f}M characters")

    extra = [Path(name) for name in settings.extra]
    return collect(total, settings.seed, extra, on_progress=on_progress)


def _tokenizer_sample(
    documents: Sequence[Document], extra_texts: Sequence[str], settings: PrepareConfig
) -> Iterator[str]:
    characters = 0
    for number in np.random.default_rng(settings.seed).permutation(len(documents)):
        if characters > _SAMPLE_CHARS:
            break
        characters += len(documents[number].text)
        yield full_text(documents[number])
    if settings.arithmetic_share:
        yield from map(full_text, islice(arithmetic_documents(settings.seed), _SAMPLE_ARITHMETIC_DOCUMENTS))
    if extra_chars := sum(map(len, extra_texts)):
        for _ in range(1 + int(_SAMPLE_EXTRA_SHARE * characters / extra_chars)):
            yield from extra_texts


def _train_tokenizer(folder: Path, sample: list[str], vocab_size: int, progress: Progress) -> Tokenizer:
    progress("tokenizer", 0, 1, f"{sum(map(len, sample)) / 1e6:.1f}M characters")
    tokenizer = train_tokenizer(sample, vocab_size)
    with disk_errors(folder):
        tokenizer.save(folder)
    progress("tokenizer", 1, 1, f"{tokenizer.vocab_size} tokens")
    return tokenizer


def _write_shards(
    out: Path,
    vocab_size: int,
    encoded: Sequence[EncodedDocument],
    settings: PrepareConfig,
    progress: Progress,
) -> dict[str, Any]:
    """Shuffle the documents, split off validation, write both; return the counts of each split."""
    order = np.random.default_rng(settings.seed).permutation(len(encoded))
    held_back = choose_validation(encoded, order, settings.val_tokens)
    splits = {
        "train": [encoded[number] for number in order if number not in held_back],
        "val": [encoded[number] for number in order if number in held_back],
    }
    counts = {}
    for split, documents in splits.items():
        with ShardWriter(out / split, vocab_size, settings.shard_tokens) as writer:
            for done, document in enumerate(documents, start=1):
                writer.add(document.ids, document.kind)
                if done % 1_000 == 0 or done == len(documents):
                    progress(f"write {split}", done, len(documents), f"{done:,} documents")
        shards = TokenShards(out / split)
        counts[split] = {
            "documents": len(documents),
            "tokens": shards.total_tokens,
            "tokens_by_kind": shards.tokens_by_source,
        }
    return counts


def _baselines(out: Path, context: int, progress: Progress) -> tuple[float, float]:
    progress("baselines", 0, 1, "")
    train, val = TokenShards(out / "train"), TokenShards(out / "val")
    rows = validation(val, context, max_rows=val.total_tokens)
    tokens = train.slice(0, train.total_tokens)
    losses = unigram_bigram(tokens, rows.tokens, rows.segments, train.vocab_size)
    progress("baselines", 1, 1, f"bigram loss {losses[1]:.3f}")
    return losses


def _key(settings: PrepareConfig, tokenizer_texts: Sequence[str]) -> str:
    """Return a fingerprint of all that shapes the data; the user's files count by size and time of change."""
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for name in settings.extra
        for path in sorted([Path(name), *Path(name).rglob("*")])
        if os.path.isfile(path)
    ]
    content = json.dumps([_VERSION, settings.model_dump(), files, list(tokenizer_texts)])
    return hashlib.sha256(content.encode()).hexdigest()


def _read_record(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, empty when there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
