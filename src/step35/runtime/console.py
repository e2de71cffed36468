"""What a person sees while a verb runs: progress, tables and warnings.

A terminal gets a live bar, anything else gets plain lines; `console.log` gets the plain lines in both cases.
Tools read `metrics.jsonl`, never this text.
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from step35.errors import DiskFullError
from step35.runtime.disk import disk_errors

LINE_SECONDS = 5.0
PLAIN_WIDTH = 110


class Console:
    """Writes to standard output and, as plain text, to `log_path`."""

    def __init__(self, log_path: Path | None = None) -> None:
        self.log_path = log_path
        self.screen = rich.console.Console(file=sys.stdout, highlight=False)
        if not self.screen.is_terminal:
            self.screen.width = PLAIN_WIDTH
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}", markup=False),
        )
        self.bars = Progress(*columns, console=self.screen)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str = "step", *, done: int = 0) -> Iterator[Stage]:
        """Show the progress of `total` units (None: unknown), of which `done` were done by an earlier run."""
        stage = Stage(self, name, total, unit, done)
        if self.screen.is_terminal and not self.bars.tasks:
            self.bars.start()
        stage.open()
        try:
            yield stage
        except BaseException:
            stage.close("stopped at ")
            raise
        else:
            stage.close()
        finally:
            if self.bars.live.is_started and not self.bars.tasks:
                self.bars.stop()

    def print(self, text: str = "") -> None:
        """Print `text` as it is: no markup, no wrapping."""
        self._show(Text(text))

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._show(Text(f"warning: {text}", style="yellow"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; numbers are aligned to the right."""
        table = Table(title=title or None, title_justify="left")
        for index, column in enumerate(columns):
            numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
            table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(f"{cell:.6g}" if isinstance(cell, float) else str(cell)) for cell in row))
        self._show(table)

    def _show(self, content: Text | Table) -> None:
        self.screen.print(content, soft_wrap=isinstance(content, Text))
        self.log(content)

    def log(self, content: Text | Table) -> None:
        """Append `content` to `console.log` only. A full disk is no reason to stop: the screen has shown it."""
        if self.log_path is None:
            return
        plain = rich.console.Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None)
        with plain.capture() as capture:
            plain.print(content, soft_wrap=isinstance(content, Text))
        with suppress(DiskFullError), disk_errors(self.log_path), open(self.log_path, "a", encoding="utf-8") as file:
            file.write(capture.get())


class Stage:
    """The progress of one stage; made by `Console.stage`."""

    def __init__(self, console: Console, name: str, total: int | None, unit: str, done: int) -> None:
        self.console, self.name, self.total, self.unit = console, name, total, unit
        self.done = self.first = done
        self.key = ""
        self.started = self.line_time = time.monotonic()
        self.line_done = done
        self.task: TaskID | None = None

    def open(self) -> None:
        """Announce the stage."""
        if self.console.screen.is_terminal:
            self.task = self.console.bars.add_task(
                self.name, total=self.total, completed=self.done, status=self.status()
            )
        if self.first:
            self.console.print(f"{self.name}: resumed at {self._count()} {self.unit}")

    def advance(self, n: int = 1, key: str = "") -> None:
        """Count `n` more units; `key` is the figure to watch, such as "loss 3.21"."""
        self.done += n
        self.key = key or self.key
        if self.task is not None:
            self.console.bars.update(self.task, completed=self.done, status=self.status())
        now = time.monotonic()
        tenth = self.total is not None and (self.done - self.line_done) * 10 >= self.total
        if tenth or now - self.line_time >= LINE_SECONDS:
            self.line_time, self.line_done = now, self.done
            self._line(Text(f"{self.name}: {self.status()}"))

    def status(self) -> str:
        """Return done/total, rate, time left and the key figure as one line."""
        elapsed = max(time.monotonic() - self.started, 1e-6)
        rate = (self.done - self.first) / elapsed
        parts = [f"{self._count()} {self.unit}"]
        if rate > 0 and elapsed >= 0.1:
            parts.append(f"{number(rate)} {self.unit}/s" if rate >= 0.1 else f"{number(1 / rate)} s/{self.unit}")
            if self.total is not None:
                parts.append(f"ETA {duration(max(self.total - self.done, 0) / rate)}")
        return "  ".join([*parts, *([self.key] if self.key else [])])

    def close(self, prefix: str = "") -> None:
        """Leave one line that says how far the stage came and how long it took."""
        if self.task is not None:
            self.console.bars.remove_task(self.task)
            self.console.bars.refresh()
        took = duration(time.monotonic() - self.started)
        ending = f"  {self.key}" if self.key else ""
        self.console.print(f"{self.name}: {prefix}{self._count()} {self.unit} in {took}{ending}")

    def _count(self) -> str:
        return f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"

    def _line(self, line: Text) -> None:
        if self.task is None:
            self.console.screen.print(line, soft_wrap=True)
        self.console.log(line)


def number(value: float) -> str:
    """Return about three digits of a positive number: 0.385, 12.5, 4,180,000."""
    digits = 2 - math.floor(math.log10(value))
    return f"{round(value, digits):,.0f}" if digits <= 0 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return seconds as 0:07, 12:05 or 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
