"""Tokenises one named source into a folder of token shards, and holds back some of it for validation.

`FOLDER/` holds the training documents, `FOLDER/val/` the others. The source is read as a stream: what is in memory is
one batch of documents and one shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from step35.config.data import PrepareConfig, SourceConfig
from step35.data.builtin import builtin_documents
from step35.data.document import Document
from step35.data.lines import BadLines
from step35.data.mixture import BATCH_CHARS, EncodedDocument, Progress, encode_documents, in_batches
from step35.data.readers import read_documents
from step35.data.shards import ShardWriter, TokenShards
from step35.data.tokenizer import Tokenizer
from step35.errors import DataError


def source_documents(source: SourceConfig, seed: int, bad: BadLines) -> Iterator[Document]:
    """Yield the documents of `source` in order, up to its `chars`."""
    if source.builtin:
        documents = builtin_documents(source.builtin, seed, bad)
    else:
        paths = [Path(name) for name in source.paths]
        documents = read_documents(paths, bad, domain=source.name, text_field=source.text_field)
    return documents if source.chars is None else first_documents(documents, source.chars)


def first_documents(documents: Iterator[Document], chars: int) -> Iterator[Document]:
    """Yield documents until they hold `chars` characters; pull no more than needed."""
    while chars > 0 and (document := next(documents, None)):
        chars -= len(document.text)
        yield document


def write_source(
    folder: Path, source: SourceConfig, tokenizer: Tokenizer, settings: PrepareConfig, progress: Progress
) -> dict[str, Any]:
    """Write the shards of `source`; return its counts and bad lines. Raises `DataError`, also when it is empty."""
    bad = BadLines(source.max_bad_lines)
    held_back = HeldBack(settings.val_tokens // len(settings.sources))
    documents = source_documents(source, settings.seed, bad)
    counts = {"train": 0, "val": 0, "copy": 0}
    with (
        ShardWriter(folder, tokenizer.vocab_size, settings.shard_tokens) as train,
        ShardWriter(folder / "val", tokenizer.vocab_size, settings.shard_tokens) as val,
    ):
        writers = {"train": train, "val": val}
        for batch in in_batches(documents, BATCH_CHARS):
            for document in encode_documents(tokenizer, batch):
                side = held_back.side(document)
                counts[side] += 1
                if side in writers:
                    writers[side].add(document.ids, source.name, meta_tokens=document.meta_tokens)
            done = sum(counts.values())
            progress(f"source {source.name}", done, 0, f"{bad.count} bad lines")
        if not counts["train"]:
            raise DataError(f"source {source.name!r} holds no documents ({bad.count} bad lines); check its paths.")
    return {
        "documents": counts["train"],
        "tokens": TokenShards(folder).total_tokens,
        "val_documents": counts["val"],
        "copies_of_val": counts["copy"],
        **bad.record(),
    }


class HeldBack:
    """Chooses documents for validation by a hash of their text, so that all copies of a text get the same answer.

    One text in ten is held back until `tokens` are full, once; its later copies are left out of training. Texts
    longer than a quarter of `tokens` stay in training, and so does the first one: a small source has something left.
    """

    def __init__(self, tokens: int) -> None:
        self._left = tokens
        self._longest = tokens / 4
        self._texts: set[bytes] = set()
        self._first: bytes | None = None

    def side(self, document: EncodedDocument) -> Literal["train", "val", "copy"]:
        """Say where the next document of the stream goes."""
        # Copies may differ in their meta line, so it has no say.
        ids = document.ids[document.meta_tokens :]
        text = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        if text in self._texts:
            return "copy"
        self._first = self._first or text
        if text[0] % 10 or text == self._first or self._left <= 0 or ids.size > self._longest:
            return "train"
        self._texts.add(text)
        self._left -= document.ids.size
        return "val"


def join_validation(out: Path, folders: Sequence[Path], settings: PrepareConfig) -> None:
    """Write what the sources held back to `out`, shuffled, so that the first rows are a sample of all of it."""
    found = [(folder.name, document) for folder in folders for document in _documents(TokenShards(folder / "val"))]
    order = np.random.default_rng(settings.seed).permutation(len(found))
    with ShardWriter(out, TokenShards(folders[0]).vocab_size, settings.shard_tokens) as writer:
        for number in order:
            name, document = found[number]
            writer.add(document.ids, name, meta_tokens=document.meta_tokens)


def _documents(shards: TokenShards) -> Iterator[EncodedDocument]:
    assert shards.meta_tokens is not None  # `write_source` has just counted them
    for ids, meta_tokens in zip(shards.documents(), shards.meta_tokens.tolist(), strict=True):
        yield EncodedDocument(ids, "", meta_tokens)
