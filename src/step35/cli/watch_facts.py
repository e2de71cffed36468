"""The facts of a run that a person asks for first: does it run, how far is it, how fast, how long still."""

from __future__ import annotations

import math
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from step35.cli.watch_feed import Feed
from step35.runtime.disk import read_record

STALL_SECONDS = 60.0
"""Least silence that counts as a stall."""
STALL_INTERVALS = 10
"""So many times the usual time between two records is a stall as well."""
ENDINGS = ("interrupted", "stopped")
"""Events after which nothing more is written until a resume; the status has the same name."""


class Status(NamedTuple):
    """What a run is doing."""

    word: str
    """running, finished, stalled, interrupted, stopped or empty"""
    since: float
    """Unix time of the last sign of life."""


def facts(feed: Feed, now: float | None = None) -> dict[str, Any]:
    """Return everything about the run but its curves and panels, as JSON can hold it."""
    config = read_record(feed.run / "config.json")
    total = config.get("steps")
    status = status_of(feed, time.time() if now is None else now)
    pace = seconds_per_step(feed)
    left = pace * (total - feed.step) if pace and isinstance(total, int) and status.word == "running" else None
    return {
        "status": status.word,
        "since": status.since,
        "step": feed.step,
        "steps": total,
        "seconds_per_step": pace,
        "seconds_left": left,
        "records": feed.records,
        "generation": feed.generation,
        "behind_bytes": feed.behind_bytes,
        "bad_lines": feed.bad_lines,
        "checkpoints": checkpoints(feed.run),
        "last": {key: _finite(curve.last) for key, curve in feed.curves.items()},
        "panel_records": len(feed.spots),
        "alarms": list(feed.alarms),
        "alarm_counts": dict(feed.alarm_counts),
        "events": list(feed.events),
        "config": config,
        "env": read_record(feed.run / "env.json"),
        "result": read_record(feed.run / "done.json") or read_record(feed.run / "summary.json"),
    }


def status_of(feed: Feed, now: float) -> Status:
    """Tell from its files what a run is doing. A finished stage has a `done.json`, a finished demo a `summary.json`."""
    seen = max((modified(feed.run / name) for name in ("metrics.jsonl", "events.jsonl")), default=0.0)
    for ending in ("done.json", "summary.json"):
        if (feed.run / ending).is_file():
            return Status("finished", modified(feed.run / ending))
    if not seen:
        return Status("empty", modified(feed.run))
    if feed.last_kind in ENDINGS:
        return Status(feed.last_kind, seen)
    patience = max(STALL_SECONDS, STALL_INTERVALS * (_seconds_per_record(feed) or 0.0))
    return Status("running" if now - seen < patience else "stalled", seen)


def seconds_per_step(feed: Feed) -> float | None:
    """Return the usual time of a step over the last fifty records; None before there are two."""
    times = list(feed.times)
    rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(times) if b[0] > a[0]]
    return median(rates) if rates else None


def _seconds_per_record(feed: Feed) -> float | None:
    times = [moment for _, moment in feed.times]
    return median(b - a for a, b in pairwise(times)) if len(times) > 1 else None


def checkpoints(run: Path) -> list[int]:
    """Return the steps of the published checkpoints, oldest first."""
    try:
        names = os.listdir(run / "checkpoints")
    except OSError:
        return []
    return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d+", name))


def modified(path: Path) -> float:
    """Return when `path` was last written, in unix seconds; 0 when it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
