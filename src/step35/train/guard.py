"""What follows from an alarm: skip the batch, go back to a checkpoint, or stop (section 4.1).

A run keeps two numbers: `step` (updates made) and `row` (rows of data taken). They part here: a skipped batch moves
the row alone, and a rollback takes the step back while the row goes on past the data that led into trouble.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np

from step35.config.train import TrainConfig
from step35.data.loader import Loader
from step35.data.packing import Batch
from step35.errors import CheckpointError, DataError, DivergedError
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.rundir import RunDir
from step35.runtime.saver import Saver
from step35.train.monitors.alarms import BAD_DATA, Alarm, severest
from step35.train.step import Learner


@dataclass
class Position:
    """Where a run is, and what alarms have cost it so far."""

    step: int = 0
    row: int = 0
    skips: int = 0
    """Batches skipped since the last update."""
    rollbacks: int = 0
    rolled_back_to: int = -1
    """Step of the last rollback."""

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """Return the position saved in a checkpoint's state."""
        return cls(**{name: state[name] for name in cls.__dataclass_fields__ if name in state})

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain numbers."""
        return asdict(self)


class Guard:
    """Makes updates and acts on alarms. It owns the position; the trainer saves it with the learner's state."""

    def __init__(
        self, learner: Learner, at: Position, config: TrainConfig, run: RunDir, console: Console, saver: Saver
    ) -> None:
        self.learner, self.at, self.config = learner, at, config
        self.run, self.console, self.saver = run, console, saver

    def save(self) -> None:
        """Begin to save the learner at the position."""
        self.saver.save(self.at.step, {**self.at.state_dict(), **self.learner.state_dict()})

    def advance(self, loader: Loader) -> dict[str, Any] | None:
        """Take the next rows and make an update; return its metrics, or None when it was skipped or undone.

        Raises `DivergedError` or `DataError` when the run has to stop.
        """
        at, learner = self.at, self.learner
        batch = self._next_rows(loader)
        metrics = learner.accumulate(batch, at.step)
        if self._alarmed(metrics, after_update=False):
            return None
        metrics |= learner.apply(at.step)
        if self._alarmed(metrics, after_update=True):
            return None
        at.step, at.skips = at.step + 1, 0
        return metrics

    def _next_rows(self, loader: Loader) -> Batch:
        """Take the rows of this step, leaving out those that cannot be read when the run is to go on without them."""
        at, count = self.at, self.config.rows_at(self.at.step)
        try:
            batch = self._read(loader, at.row, count)
        except DataError as error:
            if self.config.stability.bad_data.action == "stop":
                self._refuse(range(at.row, at.row + count), error)
            return self._readable_rows(loader, count, error)
        at.row += count
        return batch

    def _readable_rows(self, loader: Loader, count: int, error: DataError) -> Batch:
        """Take the next `count` rows that can be read, one by one; tell which were left out."""
        at, row = self.at, self.at.row
        found: list[Batch] = []
        left_out: list[int] = []
        while len(found) < count:
            try:
                found.append(self._read(loader, row, 1))
            except DataError:
                left_out.append(row)
                if len(left_out) > self.config.stability.max_skips * count:
                    self._refuse(left_out, error)
            row += 1
        if left_out:
            self._tell_bad_data(left_out, error)
            self.run.events.event("rows_left_out", step=at.step, rows=left_out)
        at.row = row
        return Batch(*(np.concatenate(columns) for columns in zip(*map(_columns, found), strict=True)))

    def _refuse(self, rows: Sequence[int], error: DataError) -> NoReturn:
        """Stop with the error itself, which names the file."""
        self._tell_bad_data(rows, error)
        self.run.events.event("stopped", step=self.at.step, alarm=BAD_DATA.name, reason=str(error))
        raise error

    def _tell_bad_data(self, rows: Sequence[int], error: DataError) -> None:
        where, action = f"rows {rows[0]} to {rows[-1]}", self.config.stability.bad_data.action
        self._tell(Alarm(BAD_DATA.name, self.at.step, len(rows), 0, where, str(error), BAD_DATA.remedy, action))

    def _read(self, loader: Loader, first: int, count: int) -> Batch:
        batch = loader.rows(first, count)
        low, high, size = batch.tokens.min(), batch.tokens.max(), self.learner.model.config.vocab_size
        if low < 0 or high >= size:
            raise DataError(
                f"rows {first} to {first + len(batch.tokens) - 1} hold token ids {low} to {high}, but the model's "
                f"vocabulary is 0 to {size - 1}: the data is damaged, or was made with another tokenizer."
            )
        return batch

    def _alarmed(self, metrics: dict[str, Any], *, after_update: bool) -> bool:
        """Tell the new alarms and do what the severest one asks; return whether the update is off."""
        holding, new = self.learner.monitor.judge(metrics, self.at.step, after_update=after_update)
        for alarm in new:
            self._tell(alarm)
        acting = severest(holding)
        if acting is None:
            return False
        self.learner.drop()
        action = acting.action
        if after_update and action == "skip":  # too late to leave the batch out
            action = "rollback"
        {"skip": self._skip, "rollback": self._roll_back, "stop": self._stop}[action](acting)
        return True

    def _tell(self, alarm: Alarm) -> None:
        self.run.events.event("alarm", **alarm.record())
        self.console.warn(str(alarm))

    def _skip(self, alarm: Alarm) -> None:
        at = self.at
        at.skips += 1
        self.run.events.event("batch_skipped", step=at.step, row=at.row, alarm=alarm.alarm, in_a_row=at.skips)
        if at.skips > self.config.stability.max_skips:
            self._stop(alarm, f"{at.skips} batches in a row were to be skipped (stability.max_skips).")

    def _roll_back(self, alarm: Alarm) -> None:
        """Take up the last good checkpoint and go on past the data seen since; save, so that a kill keeps it so."""
        at = self.at
        self.saver.wait()  # the newest checkpoint may still be on its way to the disk
        at.rollbacks += 1
        if at.rollbacks > self.config.stability.max_rollbacks:
            self._stop(alarm, f"{at.rollbacks - 1} rollbacks were made (stability.max_rollbacks).")
        restored = self._last_good()
        if restored is None:
            self._stop(alarm, "There is no checkpoint to go back to.")
        discard_damaged(restored, self.run, self.console)
        undone, state = at.step, restored.state
        self.learner.load_state_dict(state)
        at.step = at.rolled_back_to = state["step"]
        at.skips = 0
        self.run.metrics.truncate_after(at.step)
        event = {"from_step": undone, "step": at.step, "row": at.row, "count": at.rollbacks}
        self.run.events.event("rolled_back", alarm=alarm.alarm, **event)
        self.console.warn(f"rolled back from step {undone} to {at.step}; going on at row {at.row}")
        self.save()

    def _last_good(self) -> checkpoint.Restored | None:
        """Return the newest checkpoint; or, when that is where the last rollback began, the one before it."""
        newest = checkpoint.latest_state(self.run.checkpoints)
        if newest is None or newest.state["step"] != self.at.rolled_back_to:
            return newest
        try:
            older = checkpoint.latest_state(self.run.checkpoints, before=newest.state["step"])
        except CheckpointError:  # there are some, and none is whole
            older = None
        if older is None:
            return newest
        checkpoint.discard(newest.path)  # it led into trouble twice
        self.run.events.event("checkpoint_discarded", step=newest.state["step"])
        return older

    def _stop(self, alarm: Alarm, reason: str = "") -> NoReturn:
        self.saver.wait()
        self.run.events.event("stopped", step=self.at.step, alarm=alarm.alarm, reason=reason)
        newest = checkpoint.latest(self.run.checkpoints)
        raise DivergedError(
            f"{alarm} {reason}{' ' if reason else ''}The run has stopped and saved nothing of this step; the newest "
            f"checkpoint is {newest or 'none'}."
        )


def discard_damaged(restored: checkpoint.Restored, run: RunDir, console: Console) -> None:
    """Say which newer checkpoints were passed over, and take them away: nothing else is to think them the newest."""
    for path, reason in restored.skipped.items():
        console.warn(f"{reason} Going back to {restored.path.name}.")
        run.events.event("checkpoint_skipped", reason=reason)
        checkpoint.discard(path)


def _columns(batch: Batch) -> tuple[np.ndarray[Any, Any], ...]:
    return batch.tokens, batch.segments, batch.targets
