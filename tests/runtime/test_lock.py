"""One writer a run, and no lock left behind by the dead."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from step35.errors import RunLockedError
from step35.runtime.lock import locked


def hold(folder: Path, ready: Connection) -> None:
    with locked(folder):
        ready.send(os.getpid())
        ready.recv()


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path, processes: ForkServerContext) -> None:
    ours, theirs = processes.Pipe()
    process = processes.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    try:
        pid = ours.recv()
        with pytest.raises(RunLockedError, match=f"is being written by process {pid} on .* choose another --out"):
            locked(tmp_path).__enter__()
    finally:
        process.kill()
        process.join()
    with locked(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


def test_the_lock_is_free_after_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path), pytest.raises(RunLockedError), locked(tmp_path):
        pass
