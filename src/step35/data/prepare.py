"""Builds what pre-training reads: a tokenizer, token shards for training and validation, and their baselines.

The steps are collect, tokenizer, tokenise, write, baselines; with named sources, the middle ones are taken for each
source by itself. A finished tokenizer and finished shards are reused after an interruption (`steps.json`);
`prepare.json` comes last, and then a second call does nothing. Validation holds whole documents of the training
mixture, none of which training has a copy of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from step35.config.data import PrepareConfig
from step35.data.baselines import unigram_bigram
from step35.data.document import Document
from step35.data.lines import BadLines, total
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
from step35.data.source_shards import first_documents, join_validation, source_documents, write_source
from step35.data.sources import SourceReport, collect
from step35.data.steps import VERSION, Steps, hashed, key_of, source_key, write_record
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.errors import DataError
from step35.runtime.disk import disk_errors, read_record
from step35.runtime.lock import locked

_SAMPLE_CHARS = 3_000_000
_SAMPLE_ARITHMETIC_DOCUMENTS = 2_000
_SAMPLE_EXTRA_SHARE = 0.05
"""The caller's texts are repeated to this share of the sample, enough for their words to get merges."""

_BASELINE_TOKENS = 8_000_000
"""Tokens of named sources that the baselines are fitted on."""


@dataclass(frozen=True)
class PreparedData:
    """What `prepare` left in a folder."""

    folder: Path
    tokenizer: Tokenizer
    sources: dict[str, TokenShards]
    """Training tokens of each named source; the corpus of a folder without named sources is called "corpus"."""
    val: TokenShards
    unigram_loss: float
    """Validation loss of a unigram model, nats per token."""
    bigram_loss: float
    """Validation loss of a bigram model, nats per token."""
    record: dict[str, Any]
    """The content of `prepare.json`."""

    @property
    def train(self) -> TokenShards:
        """The training tokens; raises `DataError` when they are several sources."""
        if len(self.sources) > 1:
            raise DataError(
                f"{self.folder} holds the sources {', '.join(self.sources)}; a recipe's mixture says how much of each."
            )
        return next(iter(self.sources.values()))

    @classmethod
    def load(cls, folder: Path) -> PreparedData:
        """Open a finished folder; raises `DataError` when it is unfinished or damaged."""
        record = read_record(folder / "prepare.json")
        if not record:
            raise DataError(f"{folder} holds no finished data (no prepare.json); run `step35 prepare`.")
        named = record.get("named")
        folders = {name: folder / "sources" / name for name in named} if named else {"corpus": folder / "train"}
        return cls(
            folder,
            Tokenizer.load(folder / "tokenizer"),
            {name: TokenShards(path) for name, path in folders.items()},
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
    vocabulary but are not in the corpus. Raises `DataError`, `DiskFullError`, and `RunLockedError` when another
    process is filling `out`.
    """
    key = key_of(settings, tokenizer_texts)

    def finished() -> bool:
        former = read_record(out / "prepare.json")
        whole = Steps(out, _step_files(settings)).whole("shards")
        return whole and former.get("key") == key and former.get("context") == context

    if not finished():
        val = out / "val"
        with disk_errors(out):
            val.mkdir(parents=True, exist_ok=True)
        # Not in `out`: a run knows its data by the files there, and the lock's changes with every process.
        with locked(val):
            if not finished():  # another process may just have been
                _fill(out, settings, key, progress, context, tokenizer_texts)
    return PreparedData.load(out)


def _fill(
    out: Path, settings: PrepareConfig, key: str, progress: Progress, context: int, tokenizer_texts: Sequence[str]
) -> None:
    """Take the steps that are not done yet, and write `prepare.json`."""
    steps = Steps(out, _step_files(settings))
    (out / "prepare.json").unlink(missing_ok=True)
    build = _build_sources if settings.sources else _build_corpus
    corpus = steps.once("shards", key, partial(build, out, settings, tokenizer_texts, steps, progress))
    unigram_loss, bigram_loss = _baselines(out, list(corpus.get("named", ())), context, progress)
    record = {
        "version": VERSION,
        "key": key,
        "settings": settings.model_dump(),
        "context": context,
        "unigram_loss": unigram_loss,
        "bigram_loss": bigram_loss,
        **corpus,
    }
    write_record(out / "prepare.json", record)


def _step_files(settings: PrepareConfig) -> dict[str, list[str]]:
    """Return the files that tell that a step is done."""
    sources = {
        f"source {source.name}": [f"sources/{source.name}/{index}" for index in ("index.json", "val/index.json")]
        for source in settings.sources
    }
    training = [file for files in sources.values() for file in files] or ["train/index.json"]
    return {"tokenizer": ["tokenizer/tokenizer.json"], **sources, "shards": [*training, "val/index.json"]}


def _build_corpus(
    out: Path, settings: PrepareConfig, tokenizer_texts: Sequence[str], steps: Steps, progress: Progress
) -> dict[str, Any]:
    """Run the steps from collecting to the shards; return the counts for `prepare.json`."""
    documents, report = _collect(settings, progress)
    sample = _tokenizer_sample(documents, tokenizer_texts, settings)
    tokenizer = _tokenizer(out, sample, settings, steps, progress)
    encoded = encode_mixture(
        tokenizer,
        documents,
        arithmetic_share=settings.arithmetic_share,
        seed=settings.seed,
        progress=progress,
    )
    counts = _write_shards(out, tokenizer.vocab_size, encoded, settings, progress)
    return {"vocab_size": tokenizer.vocab_size, **counts, "sources": report.record()}


def _build_sources(
    out: Path, settings: PrepareConfig, tokenizer_texts: Sequence[str], steps: Steps, progress: Progress
) -> dict[str, Any]:
    """Write the shards of each named source; return the counts for `prepare.json`."""
    tokenizer = _tokenizer(out, _sources_sample(tokenizer_texts, settings), settings, steps, progress)
    named = {}
    for source in settings.sources:
        key = source_key(source, settings, out / "tokenizer" / "tokenizer.json")
        work = partial(write_source, out / "sources" / source.name, source, tokenizer, settings, progress)
        named[source.name] = steps.once(f"source {source.name}", key, work)
    join_validation(out / "val", [out / "sources" / name for name in named], settings)
    return {"vocab_size": tokenizer.vocab_size, "named": named, "sources": total(named.values())}


def _sources_sample(extra_texts: Sequence[str], settings: PrepareConfig) -> Iterator[str]:
    """Yield the first texts of each source, as many characters of each."""
    for source in settings.sources:
        documents = source_documents(source, settings.seed, BadLines(source.max_bad_lines))
        yield from map(full_text, first_documents(documents, _SAMPLE_CHARS // len(settings.sources)))
    yield from _repeated(extra_texts, _SAMPLE_CHARS)


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
    yield from _repeated(extra_texts, characters)


def _repeated(extra_texts: Sequence[str], characters: int) -> Iterator[str]:
    """Yield the caller's texts as often as gives them their share of a sample of `characters`."""
    if extra_chars := sum(map(len, extra_texts)):
        for _ in range(1 + int(_SAMPLE_EXTRA_SHARE * characters / extra_chars)):
            yield from extra_texts


def _tokenizer(out: Path, texts: Iterator[str], settings: PrepareConfig, steps: Steps, progress: Progress) -> Tokenizer:
    """Return the tokenizer that was trained on the same `texts`, or train it."""
    folder, sample = out / "tokenizer", list(texts)

    def train() -> dict[str, Any]:
        progress("tokenizer", 0, 1, f"{sum(map(len, sample)) / 1e6:.1f}M characters")
        tokenizer = train_tokenizer(sample, settings.vocab_size)
        with disk_errors(folder):
            tokenizer.save(folder)
        progress("tokenizer", 1, 1, f"{tokenizer.vocab_size} tokens")
        return {"vocab_size": tokenizer.vocab_size}

    steps.once("tokenizer", hashed(settings.vocab_size, sample), train)
    return Tokenizer.load(folder)


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
                writer.add(document.ids, document.kind, meta_tokens=document.meta_tokens)
                if done % 1_000 == 0 or done == len(documents):
                    progress(f"write {split}", done, len(documents), f"{done:,} documents")
        shards = TokenShards(out / split)
        counts[split] = {
            "documents": len(documents),
            "tokens": shards.total_tokens,
            "tokens_by_kind": shards.tokens_by_source,
        }
    return counts


def _baselines(out: Path, named: list[str], context: int, progress: Progress) -> tuple[float, float]:
    """Return unigram and bigram loss, fitted on the corpus, or on the same number of tokens of each named source."""
    progress("baselines", 0, 1, "")
    val = TokenShards(out / "val")
    rows = validation(val, context, max_rows=val.total_tokens)
    if named:
        sources = [TokenShards(out / "sources" / name) for name in named]
        most = _BASELINE_TOKENS // len(sources)
        tokens = np.concatenate([source.slice(0, min(most, source.total_tokens)) for source in sources])
    else:
        train = TokenShards(out / "train")
        tokens = train.slice(0, train.total_tokens)
    losses = unigram_bigram(tokens, rows.tokens, rows.segments, val.vocab_size)
    progress("baselines", 1, 1, f"bigram loss {losses[1]:.3f}")
    return losses
