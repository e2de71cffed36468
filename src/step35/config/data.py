"""Knobs of `step35 prepare`: what the corpus holds and how it is cut."""

from __future__ import annotations

from pydantic import Field, model_validator

from step35.config.base import Config


class SourceConfig(Config):
    """One named source of documents: files of your own, or a corpus that is built in."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name in a recipe's mixture, and of the folder of its token shards."""
    paths: tuple[str, ...] = ()
    """Files and folders: text and code, .jsonl, each also as .gz or .zst, .parquet, folders of token shards."""
    builtin: str | None = None
    """A corpus that every machine has, not paths: code, documentation, arithmetic, needle, needle-4k, ..."""
    chars: int | None = Field(default=None, ge=1)
    """Characters to take, from the start; None takes all, a built-in corpus needs a number."""
    text_field: str = "text"
    """Field of JSON records, or column of parquet files, that holds the text."""
    max_bad_lines: int = Field(default=100, ge=0)
    """Lines that cannot be read are skipped and named up to this number; one more is an error."""

    @model_validator(mode="after")
    def _files_or_builtin(self) -> SourceConfig:
        if bool(self.paths) == bool(self.builtin):
            raise ValueError(f"source {self.name!r} needs either paths or builtin")
        if self.builtin and not self.chars:
            raise ValueError(f"source {self.name!r}: builtin={self.builtin!r} needs chars, the characters to take")
        return self


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
    """Your own text: files and folders as in the paths of a named source; records have it in their field "text"."""
    sources: tuple[SourceConfig, ...] = ()
    """Named sources, each in token shards of its own for a recipe's mixture, instead of the corpus above."""

    @model_validator(mode="after")
    def _sources_alone(self) -> PrepareConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"each of the sources needs a name of its own, not {names}")
        for key in ("corpus_chars", "arithmetic_share", "extra") if names else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={getattr(self, key)!r} cannot take effect beside named sources; leave it out")
        return self
