"""Checkpoints in the background: training pays for a copy of the tensors, a thread does the writing.

The copy goes into memory that is kept from save to save: the first touch of fresh memory cost 25 times the copy itself
where it was measured (0.1 against 2.6 GB/s). There is one such copy, so a save that falls due while the one before is
still being written waits for it.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from step35.config.checkpoint import CheckpointConfig
from step35.errors import DiskFullError
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.disk import sync_file
from step35.runtime.rundir import RunDir
from step35.runtime.state import take_apart


class Saver:
    """Writes the checkpoints of one run, one at a time.

    A context: leaving it waits for the last save, except on `KeyboardInterrupt`, which is someone in a hurry.
    """

    def __init__(self, run: RunDir, config: CheckpointConfig, console: Console) -> None:
        self.run, self.config, self.console = run, config, console
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to save `state` as of now; it may change as soon as this returns. Raises like `wait`."""
        self.wait()
        plain, tensors = take_apart(state)
        if not self.config.background:
            self._write(step, plain, tensors)
            self.wait()
            return
        self._thread = threading.Thread(
            target=self._write,
            args=(step, plain, self._copy(tensors)),
            name=f"checkpoint of step {step}",
            daemon=True,  # so that a second Ctrl-C need not wait for the disk
        )
        self._thread.start()

    def check(self) -> None:
        """Report the failure of a save that has ended meanwhile, and wait for nothing. Raises like `wait`."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises what the writing raised; for `DiskFullError` with `on_full_disk = "continue"` it warns instead.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        with suppress(DiskFullError):  # what has no room for a checkpoint may have none for a line about it
            self.run.events.event("checkpoint_failed", reason=str(failure))
        if self.config.on_full_disk == "stop" or not isinstance(failure, DiskFullError):
            raise failure
        self.console.warn(f"{failure} Training goes on without this checkpoint.")

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            try:
                self.wait()
            except Exception as failure:  # what stopped the run is more important than this
                self.console.warn(f"the last checkpoint was not saved: {failure}")

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy on the CPU, in the memory of the copy before where the shapes are the same."""
        former, self._copies = self._copies, {}
        for name, tensor in tensors.items():
            copy = former.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name] = copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return self._copies

    def _write(self, step: int, plain: Any, tensors: dict[str, Tensor]) -> None:
        try:
            # A power loss must not take records of steps that the checkpoint says are done.
            sync_file(self.run.path / "metrics.jsonl")
            keep, keep_every = self.config.keep, self.config.keep_every
            checkpoint.write(self.run.checkpoints, step, plain, tensors, keep=keep, keep_every=keep_every)
        except Exception as error:
            self._failure = error
