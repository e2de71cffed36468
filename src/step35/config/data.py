"""Knobs of `step35 prepare`: what the corpus holds and how it is cut."""

from __future__ import annotations

from pydantic import Field

from step35.config.base import Config


class PrepareConfig(Config):
    """How to build tokenizer and token shards from the text that this machine has."""

    vocab_size: int = Field(default=4096, ge=512, le=2**31)
    """Tokens in the vocabulary, special tokens included."""
    corpus_chars: int = Field(default=12_000_000, ge=10_000)
    """Characters of real text to collect: code, docstrings and the files in `extra`."""
    arithmetic_share: float = Field(default=0.4, ge=0.0, le=0.9)
    """Share of all tokens that are procedural arithmetic documents."""
    val_tokens: int = Field(default=65_536, ge=256)
    """Tokens to hold back for validation (at most a tenth of the corpus), in the corpus' own mixture."""
    shard_tokens: int = Field(default=16_777_216, ge=1_024)
    """Tokens in one shard file; a document is never cut by a shard border."""
    seed: int = Field(default=0, ge=0)
    """Seed of file sampling, of the document order and of the arithmetic documents."""
    extra: tuple[str, ...] = ()
    """Your own text: files or folders of .txt, .md, .py, .jsonl (records with a "text" field)."""
