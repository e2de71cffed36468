"""Append-only JSONL logs: `metrics.jsonl`, the truth about a run, and `events.jsonl`.

Tools read these files, never console text. One record is one flushed line, so a kill can tear only the last
one; opening a log for writing repairs that. One process writes a log; any number may read it meanwhile.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from step35.errors import DataError
from step35.runtime.disk import disk_errors, write_text

# JSON has no spelling for these, so they are written as strings that `read_metrics` turns back into floats.
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """The measured values of a run, one record a line with "step" and "time" (unix seconds)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _repair(path)

    def log(self, step: int, **values: Any) -> None:
        """Append one record of numbers, strings, None, tensors, arrays, and lists or dicts of these."""
        _append(self.path, {"step": int(step), "time": round(time.time(), 2), **_plain(values)})

    def truncate_after(self, step: int) -> None:
        """Drop the records with a larger step, so that a replayed step is not logged twice."""
        if self.path.exists():
            kept = [line for line, record in _records(self.path) if record.get("step", 0) <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))


class EventsLog:
    """What happened in a run, one record a line with "kind" and "time" (unix seconds)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _repair(path)

    def event(self, kind: str, **values: Any) -> None:
        """Append one event."""
        _append(self.path, {"kind": kind, "time": round(time.time(), 2), **_plain(values)})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, oldest first; a missing file has none, and a torn last line is left out.

    Raises `DataError` naming the line if another one is not a JSON object.
    """
    return [_revive(record) for _, record in _records(path)] if path.exists() else []


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (line, record) for each whole line."""
    *lines, tail = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            yield line, record
        elif line.strip():
            raise DataError(f"{path}, line {number} is not a JSON object: {line[:60]!r}. Delete that line.")
    record = _parse(tail)
    if record is not None:  # whole but for its newline; otherwise torn, or empty
        yield tail, record


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _append(path: Path, record: dict[str, Any]) -> None:
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _repair(path: Path) -> None:
    """Cut a last line that a kill or a full disk has torn; complete one that lacks only its newline."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if _parse(content[whole:].decode("utf-8", errors="replace")) is not None:
        with disk_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write("\n")
    elif whole < len(content):
        os.truncate(path, whole)


def _plain(value: Any) -> Any:
    """Return `value` as JSON can hold it; floats keep 6 significant digits, more than a plot shows."""
    if hasattr(value, "tolist"):  # tensors and numpy values, recognised without importing either library
        value = value.tolist()
    elif hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(float(value))
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _revive(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _revive(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_revive(inner) for inner in value]
    return value
