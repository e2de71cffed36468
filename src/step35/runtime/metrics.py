"""Append-only JSONL logs: `metrics.jsonl`, the truth about a run, and `events.jsonl`.

Tools read these files, never console text. One record is one flushed line, so a kill can tear only the last
one; opening a log for writing repairs that. One process writes a log; any number may read it meanwhile.
Experiment trackers follow the log (`runtime/sinks.py`): they are told what has been written, after it has.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from step35.errors import DataError
from step35.runtime.disk import disk_errors, write_text

# JSON has no spelling for these, so they are written as strings that `read_metrics` turns back into floats.
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Follower(Protocol):
    """Someone who is told what the log holds. Must not raise: telling others never stops a run."""

    def logged(self, record: dict[str, Any]) -> None:
        """Take note of a record that has just been written."""
        ...

    def truncated(self, step: int) -> None:
        """Take note that the log now ends at `step`; also said when a run starts or resumes."""
        ...


class MetricsLog:
    """The measured values of a run, one record a line with "step" and "time" (unix seconds)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.followers: list[Follower] = []
        _repair(path)

    def log(self, step: int, **values: Any) -> None:
        """Append one record of numbers, strings, None, tensors, arrays, and lists or dicts of these."""
        record = {"step": int(step), "time": round(time.time(), 2), **_plain(values)}
        _append(self.path, record)
        for follower in self.followers:
            follower.logged(record)

    def truncate_after(self, step: int) -> None:
        """Drop the records with a larger step, so that a replayed step is not logged twice."""
        if self.path.exists():
            kept = [line for line, record in _records(self.path) if record.get("step", 0) <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))
        for follower in self.followers:
            follower.truncated(step)


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


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record as curves: `loss`, `mtp_loss/1` of a list, `expert_rms/max` of a panel.

    A panel (a list of lists, layer x expert) gives its min, median and max. Text, "step" and "time" are left out, and
    so is "moe_layers", which names rows of panels.
    """
    curves: dict[str, float] = {}
    for key, value in record.items():
        if key in ("step", "time", "moe_layers"):
            continue
        if isinstance(value, list):
            curves |= {f"{key}/{name}": number for name, number in _list_curves(value).items()}
        elif (number := _number(value)) is not None:
            curves[key] = number
    return curves


def is_panel(value: Any) -> bool:
    """Say whether a value of a record is a table, layer x expert."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value)


def _list_curves(values: list[Any]) -> dict[str, float]:
    if not is_panel(values):
        found = ((str(place), _number(value)) for place, value in enumerate(values, start=1))
        return {name: number for name, number in found if number is not None}
    cells = [number for row in values for cell in row if (number := _number(cell)) is not None and number == number]
    return {"min": min(cells), "median": median(cells), "max": max(cells)} if cells else {}


def _number(value: Any) -> float | None:
    if type(value) in (int, float):  # not isinstance: True is an int to it
        return float(value)
    return NOT_FINITE.get(value) if isinstance(value, str) else None


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (line, record) for each whole line."""
    *lines, tail = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None:
            yield line, record
        elif line.strip():
            raise DataError(f"{path}, line {number} is not a JSON object: {line[:60]!r}. Delete that line.")
    record = parse_record(tail)
    if record is not None:  # whole but for its newline; otherwise torn, or empty
        yield tail, record


def parse_record(line: str | bytes) -> dict[str, Any] | None:
    """Return the record in a line of a log, None when it is not a JSON object."""
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
    if parse_record(content[whole:].decode("utf-8", errors="replace")) is not None:
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
