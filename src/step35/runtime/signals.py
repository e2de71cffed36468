"""Ctrl-C and SIGTERM during a loop: the step in hand is finished and saved, then the process goes.

Schedulers send SIGTERM and kill after a grace period (30 s by default with Kubernetes and Slurm). The way out takes the
rest of one step and one save; the event "interrupted" says how many seconds that was.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from step35.errors import DiskFullError
from step35.runtime.rundir import RunDir


class Terminated(KeyboardInterrupt):
    """SIGTERM, on its way out like Ctrl-C."""


class Interruption:
    """Whether a signal asked to stop, which one, and when."""

    signal: signal.Signals | None = None
    came = 0.0

    def __call__(self) -> bool:
        return self.signal is not None

    def leave(self, run: RunDir, step: int) -> None:
        """Record that the run stops after `step` and which checkpoint is its newest; then raise like `go`.

        That checkpoint is an older one when the disk had no room for the last and the run was to go on without it.
        """
        from step35.runtime.checkpoint import latest  # torch, which the command line does without

        newest = latest(run.checkpoints)
        saved = newest.name if newest else None
        seconds = round(time.monotonic() - self.came, 2)
        name = self.signal.name if self.signal else None
        with suppress(DiskFullError):  # no reason to end as anything but interrupted
            run.events.event("interrupted", step=step, checkpoint=saved, signal=name, seconds=seconds)
        self.go()

    def go(self) -> None:
        """Raise `Terminated` or `KeyboardInterrupt` if a signal came."""
        if self.signal is not None:
            raise Terminated if self.signal == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Hold back the first signal until the step is done; the yielded object tells of it.

    A second one ends the process at once: Ctrl-C as `KeyboardInterrupt`, SIGTERM without a word. Outside the main
    thread signals cannot be handled and stay as they are. A signal that the loop did not look at any more is
    raised at the end.
    """
    interruption = Interruption()

    def hold(number: int, frame: Any) -> None:
        interruption.signal, interruption.came = signal.Signals(number), time.monotonic()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    try:
        before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        yield interruption
        return
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    interruption.go()
