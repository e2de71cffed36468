"""The record of finished steps (`steps.json`), which lets `prepare` go on where it was stopped.

Each step has a key, a hash of all that shapes its result; a step whose key is the same is not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from step35.config.data import PrepareConfig, SourceConfig
from step35.runtime.disk import fingerprint, read_record, write_text

VERSION = 1


class Steps:
    """Remembers on disk which steps are done and from what, as long as their files stay."""

    def __init__(self, out: Path, files: Mapping[str, Sequence[str]]) -> None:
        """A step only counts as finished while its `files` exist, so deleting a damaged folder rebuilds it."""
        self._out = out
        self._files = files
        self._record = read_record(out / "steps.json")

    def whole(self, step: str) -> bool:
        """Say whether all files of `step` exist."""
        return all((self._out / file).is_file() for file in self._files[step])

    def once(self, step: str, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `step` left behind when it is finished with `key`; otherwise do `work` and record its result."""
        former = self._record.get(step, {})
        if not (self.whole(step) and former.get("key") == key):
            if self._record.pop(step, None):  # its files are about to change, and `work` may be stopped half-way
                self._write()
            self._record[step] = {"key": key, "result": work()}
            self._write()
        return dict(self._record[step]["result"])

    def _write(self) -> None:
        # In one order and without the steps of former settings: the same data have the same files.
        write_record(self._out / "steps.json", {s: self._record[s] for s in self._files if s in self._record})


def key_of(settings: PrepareConfig, tokenizer_texts: Sequence[str]) -> str:
    """Return a hash of all that shapes the data: settings, the caller's texts, and what the user's files hold."""
    given = [*settings.extra, *(name for source in settings.sources for name in source.paths)]
    # Unset sources are left out: a folder made before there were any keeps its key.
    exclude: Any = {"sources": {"__all__": {"max_bad_lines"}} if settings.sources else True}
    return hashed(settings.model_dump(exclude=exclude), _contents(given), list(tokenizer_texts))


def source_key(source: SourceConfig, settings: PrepareConfig, tokenizer: Path) -> str:
    """Return a hash of all that shapes the shards of one source, with `tokenizer` the file that encodes it."""
    shared = (settings.seed, settings.val_tokens // len(settings.sources), settings.shard_tokens)
    return hashed(source.model_dump(exclude={"max_bad_lines"}), _contents(source.paths), shared, fingerprint(tokenizer))


def hashed(*parts: Any) -> str:
    """Return a hash of JSON values and of the version of what is written."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


def _contents(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Return all files of `paths` with their fingerprints."""
    found = []
    for path in (path for name in paths for path in sorted([Path(name), *Path(name).rglob("*")])):
        try:
            if path.is_file():
                found.append((str(path), fingerprint(path)))
        except OSError:
            found.append((str(path), ""))  # whoever reads it will say why it cannot be read
    return found


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write `record` as JSON in one step."""
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
