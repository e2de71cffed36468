"""List runs, show one, plot its metrics, or watch it live in a browser."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from step35.cli import charts
from step35.cli.doctor import amount
from step35.config.base import Config, suggest
from step35.errors import ConfigError, DataError
from step35.runtime.console import Console
from step35.runtime.disk import disk_errors, read_record
from step35.runtime.metrics import read_metrics

HEADLINES = ("reward", "loss", "val_loss")
BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60


class ListArgs(Config):
    """List the runs below a folder; the stages of a demo count as runs of their own."""

    root: Path = Path("runs")
    """Folder to search."""


class ShowArgs(Config):
    """Show where a run ran, its last metrics, its last events and its files."""

    run: tyro.conf.Positional[str]
    """A run: its folder, or its name below `root`."""
    root: Path = Path("runs")
    """Folder that names are looked up in."""


class PlotArgs(Config):
    """Plot metrics of a run over its steps."""

    run: tyro.conf.Positional[str]
    """A run: its folder, or its name below `root`."""
    keys: str = ""
    """Metrics to plot, separated by commas; by default the reward and the losses."""
    terminal: bool = False
    """Draw lines of text here instead of writing an image."""
    format: Literal["png", "svg"] = "png"
    """Kind of image, written to the run's folder as `plot.png` or `plot.svg`."""
    root: Path = Path("runs")
    """Folder that names are looked up in."""


class WatchArgs(Config):
    """Watch a run live in a browser: curves, expert heat maps, alarms. Finished runs as well."""

    run: tyro.conf.Positional[str]
    """A run, or a folder of runs such as a demo's: its folder, or its name below `root`."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port to serve the page on; 0 takes any that is free."""
    host: str = "127.0.0.1"
    """Address to serve on. Any but this machine's own lets others read the runs: there is no password."""
    browser: bool = True
    """Open the page in a browser."""
    root: Path = Path("runs")
    """Folder that names are looked up in; its other runs can be compared."""


Args = (
    Annotated[ListArgs, tyro.conf.subcommand("list")]
    | Annotated[ShowArgs, tyro.conf.subcommand("show")]
    | Annotated[PlotArgs, tyro.conf.subcommand("plot")]
    | Annotated[WatchArgs, tyro.conf.subcommand("watch")]
)


def main(args: ListArgs | ShowArgs | PlotArgs | WatchArgs) -> int:
    """Do what the subcommand says."""
    console = Console()
    if isinstance(args, ListArgs):
        _list(args, console)
    elif isinstance(args, ShowArgs):
        _show(args, console)
    elif isinstance(args, WatchArgs):
        return _watch(args, console)
    else:
        _plot(args, console)
    return 0


def find_runs(root: Path) -> Iterator[Path]:
    """Yield every run folder at or below `root`, known by its metrics or its env.json."""
    # Not by config.json alone: an exported model has one, too.
    for folder, children, files in os.walk(root):
        children[:] = sorted(name for name in children if name not in ("checkpoints", "rollouts"))
        if "metrics.jsonl" in files or "env.json" in files:
            yield Path(folder)


def _list(args: ListArgs, console: Console) -> None:
    rows = [_summary(run, args.root) for run in find_runs(args.root)]
    if rows:
        console.table("", ["run", "stage", "step", "last", "updated", "size"], rows)
    else:
        console.print(f"No runs in {args.root}. Start one with: step35 demo")


def _summary(run: Path, root: Path) -> tuple[str, ...]:
    name = str(run.relative_to(root)) if run != root else run.name
    try:
        records = read_metrics(run / "metrics.jsonl")
        last = next((f"{key} {value:.4g}" for key in HEADLINES if (value := _last(records, key)) is not None), "")
    except DataError:  # which `runs show` spells out
        records, last = [], "metrics.jsonl is damaged"
    step = str(records[-1].get("step", "")) if records else ""
    found = _files(run).values()
    updated = max((file.st_mtime for file in found), default=0.0)
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(updated)) if found else ""
    return name, _stage(run, records), step, last, date, amount(sum(file.st_size for file in found), "B")


def _files(run: Path) -> dict[Path, os.stat_result]:
    """Return the files of a run; without those that a live run renames or deletes meanwhile."""
    found = {}
    for folder, _, names in os.walk(run):
        for path in (Path(folder, name) for name in sorted(names)):
            with suppress(FileNotFoundError):
                found[path] = path.stat()
    return found


def _stage(run: Path, records: list[dict[str, Any]]) -> str:
    if run.name in ("train", "sft", "rl", "prepare", "eval", "distill"):
        return run.name
    if any("reward" in record for record in records):
        return "rl"
    return "train" if any("loss" in record for record in records) else ""


def _last(records: list[dict[str, Any]], key: str) -> float | None:
    return next((record[key] for record in reversed(records) if isinstance(record.get(key), int | float)), None)


def _resolve(run: str, root: Path) -> Path:
    """Return the folder of `run`, or raise `ConfigError` naming the runs there are."""
    for folder in (Path(run), root / run):
        if folder.is_dir():
            return folder
    names = [str(path.relative_to(root)) for path in find_runs(root)]
    raise ConfigError(f"there is no run '{run}'.{suggest(run, names)} Runs in {root}: {', '.join(names) or 'none'}.")


def _show(args: ShowArgs, console: Console) -> None:
    run = _resolve(args.run, args.root)
    records = read_metrics(run / "metrics.jsonl")
    events = read_metrics(run / "events.jsonl")[-8:]
    _show_record(run / "env.json", "environment", ["fact", "value"], console)
    keys = [key for key in dict.fromkeys(key for record in records for key in record) if key not in ("step", "time")]
    metrics = [(key, value) for key in keys if (value := _last(records, key)) is not None]
    _show_record(run / "summary.json", "summary", ["figure", "value"], console)
    title = f"metrics at step {records[-1].get('step')}" if records else "metrics: none yet"
    console.table(title, ["metric", "last value"], metrics)
    for event in events:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
        rest = ", ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "kind"))
        console.print(f"{date}  {event.get('kind', '')}  {rest}")
    files = [(str(path.relative_to(run)), amount(file.st_size, "B")) for path, file in sorted(_files(run).items())]
    console.table("files", ["file", "size"], files)


def _show_record(file: Path, title: str, columns: list[str], console: Console) -> None:
    record = read_record(file)
    if record:
        console.table(title, columns, list(record.items()))
    elif file.is_file():
        console.warn(f"{file} is damaged: not a JSON object, or an empty one.")


def _watch(args: WatchArgs, console: Console) -> int:
    from step35.cli.watch import watch

    run = _resolve(args.run, args.root)
    return watch(run, args.root, host=args.host, port=args.port, browser=args.browser, console=console)


def _plot(args: PlotArgs, console: Console) -> None:
    run = _resolve(args.run, args.root)
    records = read_metrics(run / "metrics.jsonl")
    known = {
        key
        for record in records
        for key, value in record.items()
        if isinstance(value, int | float) and key not in ("step", "time")
    }
    keys = [key.strip() for key in args.keys.split(",") if key.strip()] or [key for key in HEADLINES if key in known]
    for key in keys:
        if key not in known:
            raise ConfigError(
                f"'{key}' is not a metric of {run}.{suggest(key, known)} Metrics: {', '.join(sorted(known))}."
            )
    if not keys and known:
        raise ConfigError(f"{run} has no reward or loss yet; name metrics with --keys: {', '.join(sorted(known))}.")
    if not keys:
        inner = [str(path) for path in find_runs(run) if path != run and (path / "metrics.jsonl").is_file()]
        raise ConfigError(f"{run} has no metrics of its own. Runs in it that have: {', '.join(inner) or 'none'}.")
    if args.terminal:
        for key in keys:
            _, values = charts.series(records, key)
            console.print(f"{key:>20} {sparkline(values)} {values[0]:.4g} to {values[-1]:.4g}")
        return
    path = run / f"plot.{args.format}"
    with disk_errors(path):
        charts.save(path, charts.lines(run.name, {key: charts.series(records, key) for key in keys}))
    console.print(f"wrote {path}")


def sparkline(values: list[float]) -> str:
    """Return `values` as a line of block characters, at most 60, each an average; "·" if none is finite."""
    size = math.ceil(len(values) / SPARK_WIDTH)
    groups = [[v for v in values[i : i + size] if math.isfinite(v)] for i in range(0, len(values), size)]
    means = [sum(group) / len(group) if group else None for group in groups]
    finite = [mean for mean in means if mean is not None]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join("·" if mean is None else BLOCKS[round((mean - low) * scale)] for mean in means)
