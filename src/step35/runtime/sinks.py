"""Experiment trackers that follow a run: TensorBoard, trackio, wandb. `metrics.jsonl` stays the truth.

A tracker is told of a record after it has been written. `track.json` keeps, for each tracker, the name under which it
knows the run and the last step it was given; so a resumed run goes on in the same place, gets no step twice, and is
given what it missed: one that is asked for late gets the whole history. What fails is dropped with one warning, and
tried again by the next resume.

After a rollback or a resume from an earlier step, TensorBoard forgets the undone steps and shows the new ones. trackio
and wandb only ever append: they keep what they were first given for these steps, and go on after them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from step35.errors import DiskFullError, Step35Error
from step35.runtime.disk import read_record
from step35.runtime.metrics import read_metrics, scalars
from step35.runtime.rundir import RunDir

PROJECT = "step35"
CURSORS = "track.json"


class Sink(Protocol):
    """One open run of a tracker. Any call may raise anything."""

    def send(self, step: int, values: dict[str, float]) -> None:
        """Show `values` at `step`, which is later than all steps shown."""
        ...

    def rewind(self, step: int, sent: int) -> int:
        """Forget what is shown after `step`, if the tracker can; return the last step it shows, `sent` before."""
        ...

    def close(self) -> None:
        """Hand over what is still under way."""
        ...


class TensorBoard:
    """Event files in the run's `tensorboard/` folder."""

    extra = "track"

    def __init__(self, run: Path, name: str, settings: dict[str, Any]) -> None:
        self.folder = run / "tensorboard"
        self.writer = self._open(None)

    def send(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()  # a killed run loses no point that `track.json` counts as shown

    def rewind(self, step: int, sent: int) -> int:
        self.close()
        self.writer = self._open(step + 1)
        return min(step, sent)

    def close(self) -> None:
        self.writer.close()

    def _open(self, purge_step: int | None) -> Any:
        """Return a writer; TensorBoard leaves out what earlier files hold from `purge_step` on."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=str(self.folder), purge_step=purge_step)  # type: ignore[no-untyped-call]


class Appending:
    """A tracker that takes whole records and forgets none; `run` is its open run."""

    run: Any

    def send(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def rewind(self, step: int, sent: int) -> int:
        return sent

    def close(self) -> None:
        self.run.finish()


class Trackio(Appending):
    """A run of the local project "step35" (`trackio show`); its own environment variables say where it is kept."""

    extra = "trackio"

    def __init__(self, run: Path, name: str, settings: dict[str, Any]) -> None:
        import trackio

        self.run = trackio.init(
            project=PROJECT, name=name, config=settings, resume="allow",
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip


class Wandb(Appending):
    """A run of the project in WANDB_PROJECT, else "step35"; WANDB_MODE=offline keeps it in the run's `wandb/`."""

    extra = "wandb"

    def __init__(self, run: Path, name: str, settings: dict[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        quiet = wandb.Settings(console="off", silent=True)  # the run has a console of its own
        self.run = wandb.init(
            project=project, id=name, name=name, dir=str(run), config=settings, resume="allow", settings=quiet
        )


SINKS: dict[str, type[TensorBoard] | type[Trackio] | type[Wandb]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


class Tracker:
    """A follower of the metrics log that passes records on to one sink, and survives it."""

    def __init__(self, kind: str, run: RunDir, settings: dict[str, Any], warn: Callable[[str], None]) -> None:
        self.kind, self.run, self.settings, self.warn = kind, run, settings, warn
        self.failed = False
        # A cursor that makes no sense is none: the tracker gets the whole history, under a new name.
        name, step = _cursor(run.path, kind)
        self.name, self.sent = name or _fresh_name(run.path), step

    def open(self) -> None:
        """Begin a session of the sink."""
        self._guarded(self._open)

    def logged(self, record: dict[str, Any]) -> None:
        """Pass on one record."""
        self._guarded(lambda: self._send(record))

    def truncated(self, step: int) -> None:
        """Bring the sink in line with a log that ends at `step`: undone steps go, missed ones are sent."""
        self._guarded(lambda: self._rewind(step))

    def close(self) -> None:
        """End the sink's session; the next one goes on in the same run."""
        self._guarded(lambda: self.sink.close())

    def _open(self) -> None:
        self.sink: Sink = SINKS[self.kind](self.run.path, self.name, self.settings)

    def _send(self, record: dict[str, Any]) -> None:
        step = int(record["step"])
        if step > self.sent:
            self.sink.send(step, scalars(record))
            self._keep(step)

    def _rewind(self, step: int) -> None:
        self._keep(self.sink.rewind(step, self.sent))
        for record in read_metrics(self.run.metrics.path):
            self._send(record)

    def _keep(self, step: int) -> None:
        """Note in `track.json` how far the sink has come."""
        self.sent = step
        path = self.run.path / CURSORS
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({**read_record(path), self.kind: {"name": self.name, "step": step}}))
        os.replace(draft, path)  # not flushed to the disk: after a power cut some steps are sent again, no more

    def _guarded(self, work: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            work()
        except Exception as error:  # a tracker can fail in any way; the run goes on
            self.failed = True
            reason = f"{type(error).__name__}: {error}"
            self.warn(f"{self.kind} failed and gets no more metrics until the run is resumed ({reason}).")
            with suppress(DiskFullError):  # which may be why it failed
                self.run.events.event("tracker_failed", tracker=self.kind, reason=reason)


@contextmanager
def tracking(
    run: RunDir, kinds: Sequence[str], settings: dict[str, Any], warn: Callable[[str], None]
) -> Iterator[None]:
    """Let trackers follow the metrics of `run` meanwhile. Raises `Step35Error` when one is not installed."""
    for kind in kinds:
        _require(kind)
    trackers = [Tracker(kind, run, settings, warn) for kind in dict.fromkeys(kinds)]
    for tracker in trackers:
        tracker.open()
    run.metrics.followers.extend(trackers)
    try:
        yield
    finally:
        for tracker in trackers:
            run.metrics.followers.remove(tracker)
            tracker.close()


def _require(kind: str) -> None:
    if importlib.util.find_spec(kind) is None:
        extra = SINKS[kind].extra
        raise Step35Error(f'--track {kind} needs {kind}, which is not installed: pip install "step35[{extra}]"')


def _cursor(run: Path, kind: str) -> tuple[str, int]:
    """Return the name under which a tracker knows the run and the last step it was given; "" and 0 at first."""
    match read_record(run / CURSORS).get(kind):
        case {"name": str(name), "step": int(step)}:
            return name, step
    return "", 0


def _fresh_name(run: Path) -> str:
    """Return a name that says which run it is (its folder and the one above) and is no other run's."""
    folders = re.sub(r"[^\w.-]", "-", "-".join(run.resolve().parts[-2:]))  # trackers refuse some characters
    return f"{folders}-{secrets.token_hex(3)}"
