"""The record of finished steps (`steps.json`), which lets `prepare` go on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step35.config.data import PrepareConfig
from step35.runtime.disk import read_record, write_text

VERSION = 1


class Steps:
    """Remembers on disk which steps are done, as long as the settings and the files stay."""

    def __init__(self, out: Path, key: str, files: Mapping[str, Sequence[str]]) -> None:
        """A step only counts as finished while its `files` exist, so deleting a damaged folder rebuilds it."""
        record = read_record(out / "steps.json")
        self._out = out
        self._files = files
        self._record: dict[str, Any] = record if record.get("key") == key else {"key": key}

    def result(self, step: str) -> dict[str, Any]:
        """Return what a finished step left behind, or an empty dictionary."""
        if not all((self._out / file).is_file() for file in self._files[step]):
            return {}
        return dict(self._record.get(step, {}))

    def finish(self, step: str, result: dict[str, Any]) -> None:
        """Record that `step` is done."""
        self._record[step] = result
        write_record(self._out / "steps.json", self._record)


def key_of(settings: PrepareConfig, tokenizer_texts: Sequence[str]) -> str:
    """Return a fingerprint of all that shapes the data; the user's files count by size and time of change."""
    given = [*settings.extra, *(name for source in settings.sources for name in source.paths)]
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for name in given
        for path in sorted([Path(name), *Path(name).rglob("*")])
        if os.path.isfile(path)
    ]
    # Unset sources are left out: a folder made before there were any keeps its key.
    chosen = settings.model_dump(exclude=None if settings.sources else {"sources"})
    content = json.dumps([VERSION, chosen, files, list(tokenizer_texts)])
    return hashlib.sha256(content.encode()).hexdigest()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write `record` as JSON in one step."""
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
