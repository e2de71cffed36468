"""What the page knows of one run, kept up with its files: curves, places of panels, alarms and events.

Memory grows by 8 bytes a value; panels stay on disk and only their byte offsets are kept. Torch is not needed.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from step35.cli.watch_tail import Lines, Tail, line_at
from step35.runtime.metrics import is_panel, parse_record, scalars

EVENTS_KEPT = 200
LIFE = ("started", "resumed", "interrupted", "stopped", "finished")
"""Events that say whether a run goes on."""
COLUMNS = {"group_load": "EP group"}
"""What the columns of a panel stand for, where it is not experts."""
CURVE_DIGITS = 6
"""Significant digits of a value, as many as `metrics.jsonl` keeps."""


class Curve:
    """The values of one metric by step."""

    def __init__(self) -> None:
        # float32 holds the 6 digits that the log keeps, at half the memory; what is beyond it counts as infinite.
        self.steps, self.values = array("I"), array("f")
        self.last = math.nan
        """The newest value as the log has it: a count such as `tokens` has more than 6 digits."""

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)
        self.last = value

    def window(self, first: int, last: int, points: int) -> dict[str, Any]:
        """Return the steps from `first` to `last` in at most `points` buckets, see `buckets`."""
        # Views, not copies: they are gone before the arrays grow again.
        steps, values = np.frombuffer(self.steps, np.uint32), np.frombuffer(self.values, np.float32)
        low, high = np.searchsorted(steps, np.array([first, last + 1], np.uint32))
        width = bucket_width(int(high - low), points)
        return buckets(steps[low:high], values[low:high].astype(np.float64), width)


def bucket_width(count: int, points: int) -> int:
    """Return the least power of two that cuts `count` values into at most `points` buckets.

    A power of two, so that borders stay where they are while a curve grows, and a live line does not flicker.
    """
    return 1 << max(0, math.ceil(math.log2(max(count, 1) / points)))


def buckets(steps: np.ndarray, values: np.ndarray, width: int) -> dict[str, Any]:
    """Return columns over buckets of `width` values: first and last step, mean, low and high.

    Low and high let a spike of a single step survive. Values that are not finite are left out of all three, and
    named in `bad`, the steps of the first hundred of them; a bucket of nothing else holds None. With a width
    of 1 there are `first` and `mean` only.
    """
    if not len(values):
        return {"first": [], "mean": [], "bad": []}
    finite = np.isfinite(values)
    bad = steps[~finite][:100].tolist()
    if width == 1:
        return {"first": steps.tolist(), "mean": _plain(np.where(finite, values, np.nan)), "bad": bad}
    edges = np.arange(0, len(values), width)
    count = np.add.reduceat(finite.astype(float), edges)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, values, 0.0), edges) / count
    return {
        "first": steps[edges].tolist(),
        "last": steps[np.append(edges[1:], len(values)) - 1].tolist(),
        "mean": _plain(mean),
        "low": _plain(np.minimum.reduceat(np.where(finite, values, np.inf), edges)),
        "high": _plain(np.maximum.reduceat(np.where(finite, values, -np.inf), edges)),
        "bad": bad,
    }


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.{CURVE_DIGITS}g}") if math.isfinite(v) else None for v in values.tolist()]


class Spot(NamedTuple):
    """Where in `metrics.jsonl` a record with panels begins."""

    step: int
    offset: int


class Feed:
    """One run's files, read as they grow. One request at a time may use it: hold `lock`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.lock = Lock()
        self.metrics_tail, self.events_tail = Tail(run / "metrics.jsonl"), Tail(run / "events.jsonl")
        self.generation = 0
        self._forget_metrics()
        self._forget_events()

    def _forget_metrics(self) -> None:
        self.generation += 1
        self.curves: dict[str, Curve] = {}
        self.spots: list[Spot] = []
        self.ranges: dict[str, tuple[float, float]] = {}
        self.step, self.records, self.bad_lines, self.behind_bytes = 0, 0, 0, 0
        self.times: deque[tuple[int, float]] = deque(maxlen=50)

    def _forget_events(self) -> None:
        self.alarms: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self.alarm_counts: Counter[str] = Counter()
        self.last_kind = ""  # of those in LIFE

    def poll(self) -> None:
        """Take in what has been written since the last call."""
        found = self.metrics_tail.read()
        if found.restarted:
            self._forget_metrics()
        self.behind_bytes = found.behind_bytes
        for offset, record in self._parsed(found):
            self._add_record(offset, record)
        found = self.events_tail.read()
        if found.restarted:
            self._forget_events()
        for _, event in self._parsed(found):
            self._add_event(event)

    def _parsed(self, found: Lines) -> Iterator[tuple[int, dict[str, Any]]]:
        for offset, line in found.lines:
            record = parse_record(line)
            if record is not None:
                yield offset, record
            elif line.strip():
                self.bad_lines += 1

    def _add_record(self, offset: int, record: dict[str, Any]) -> None:
        step = record.get("step")
        if not isinstance(step, int) or not 0 <= step < 2**32:
            self.bad_lines += 1
            return
        self.step, self.records = step, self.records + 1
        if isinstance(record.get("time"), int | float):
            self.times.append((step, float(record["time"])))
        numbers = scalars(record)
        for key, value in numbers.items():
            if key not in self.curves:
                self.curves[key] = Curve()
            self.curves[key].add(step, value)
        panels = [key for key, value in record.items() if is_panel(value)]
        if panels:
            self.spots.append(Spot(step, offset))
        for key in panels:
            low, high = self.ranges.get(key, (math.inf, -math.inf))
            found = [
                v for v in (numbers.get(f"{key}/min"), numbers.get(f"{key}/max")) if v is not None and math.isfinite(v)
            ]
            self.ranges[key] = min([low, *found]), max([high, *found])

    def _add_event(self, event: dict[str, Any]) -> None:
        if event.get("kind") == "alarm":
            self.alarms.append(event)
            self.alarm_counts[str(event.get("alarm", ""))] += 1
        else:
            self.events.append(event)
            self.last_kind = event["kind"] if event.get("kind") in LIFE else self.last_kind

    def panels(self, place: int) -> dict[str, Any] | None:
        """Return the panels of record number `place` of those that hold any; None when the file has just changed.

        For each, `rows` are layers, of what `column` says (None where not finite), and `low` and `high` are the range
        over all steps so far. `layers` names the rows, where the record does.
        """
        if not 0 <= place < len(self.spots):
            return None
        spot = self.spots[place]
        record = parse_record(line_at(self.run / "metrics.jsonl", spot.offset)) or {}
        if record.get("step") != spot.step:
            return None
        found = {key: self._panel(key, value) for key, value in record.items() if is_panel(value)}
        return {"step": spot.step, "layers": record.get("moe_layers"), "panels": found}

    def _panel(self, key: str, value: list[list[Any]]) -> dict[str, Any]:
        rows = [[cell if isinstance(cell, int | float) else None for cell in row] for row in value]
        low, high = (bound if math.isfinite(bound) else None for bound in self.ranges[key])
        return {"column": COLUMNS.get(key, "expert"), "rows": rows, "low": low, "high": high}
