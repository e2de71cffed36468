"""Saving in the background: the state as it was, one at a time, and no failure in silence."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from step35.config.checkpoint import CheckpointConfig
from step35.errors import DiskFullError
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.metrics import read_metrics
from step35.runtime.rundir import RunDir
from step35.runtime.saver import Saver

Make = Callable[..., Saver]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda **changes: Saver(RunDir(tmp_path), CheckpointConfig(**changes), Console())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold back every write until the event is set."""
    opened, write = threading.Event(), checkpoint.write_tensors

    def waiting(folder: Path, tensors: dict[str, Any]) -> None:
        assert opened.wait(30)
        write(folder, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", waiting)
    yield opened
    opened.set()


def state_of(number: float) -> dict[str, Any]:
    return {"weight": torch.full((4,), number), "groups": [{"lr": number}]}


def saved(folder: Path, step: int) -> tuple[float, float]:
    state = checkpoint.load(folder / "checkpoints" / f"step_{step}")
    return state["weight"][0].item(), state["groups"][0]["lr"]


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_tensors", full)


def test_it_saves_the_state_of_the_call(make: Make, tmp_path: Path, gate: threading.Event) -> None:
    state = state_of(1.0)
    with make() as saver:
        saver.save(1, state)
        state["weight"] += 1  # as the next step does, while the first is still being written
        state["groups"][0]["lr"] = 2.0
        assert checkpoint.latest(tmp_path / "checkpoints") is None
        gate.set()
        saver.save(2, state)
    assert saved(tmp_path, 1) == (1.0, 1.0)
    assert saved(tmp_path, 2) == (2.0, 2.0)


def test_the_log_is_on_the_disk_before_the_checkpoint_counts(
    make: Make, tmp_path: Path, order: list[tuple[str, int | str]]
) -> None:
    with make() as saver:
        saver.run.metrics.log(1, loss=1.0)
        saver.save(1, state_of(1.0))
    published = order.index(("rename", str(tmp_path / "checkpoints" / "step_1")))
    assert ("flush", saver.run.metrics.path.stat().st_ino) in order[:published]


def test_never_two_at_once(make: Make, gate: threading.Event) -> None:
    with make() as saver:
        saver.save(1, state_of(1.0))
        threading.Timer(0.2, gate.set).start()
        saver.save(2, state_of(2.0))  # waits for the first
        assert gate.is_set()


def test_the_memory_of_the_copy_is_kept(make: Make) -> None:
    with make() as saver:
        addresses = []
        for step in (1, 2):
            saver.save(step, state_of(step))
            addresses.append(saver._copies["weight"].data_ptr())
        assert addresses[0] == addresses[1]
        saver.save(3, {"weight": torch.ones(5)})  # another shape, and one tensor less
        assert saver._copies.keys() == {"weight"}


@pytest.mark.parametrize("background", [True, False])
def test_the_policy_is_heeded(make: Make, tmp_path: Path, background: bool) -> None:
    with make(keep=1, keep_every=2, background=background) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_2", "step_3"]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_stops(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    with pytest.raises(DiskFullError, match="step_2"), make(background=background) as saver:  # noqa: PT012
        saver.save(1, state_of(1.0))
        saver.wait()
        fill_disk(monkeypatch)
        saver.save(2, state_of(2.0))
        while True:  # the steps after it: the failure shows at one of them
            saver.check()
    assert [event["kind"] for event in read_metrics(tmp_path / "events.jsonl")] == ["checkpoint_failed"]
    assert saved(tmp_path, 1) == (1.0, 1.0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_survived(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with make(background=background, on_full_disk="continue") as saver:
        saver.save(1, state_of(1.0))
        saver.wait()
        with monkeypatch.context() as patched:
            fill_disk(patched)
            saver.save(2, state_of(2.0))
            saver.wait()
        saver.save(3, state_of(3.0))  # someone made room
    assert "Training goes on without this checkpoint" in capsys.readouterr().out
    assert [event["kind"] for event in read_metrics(tmp_path / "events.jsonl")] == ["checkpoint_failed"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_1", "step_3"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_without_room_for_a_line_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("events.jsonl", "console.log"):
        (tmp_path / name).symlink_to("/dev/full")
    fill_disk(monkeypatch)
    config, console = CheckpointConfig(on_full_disk="continue"), Console(tmp_path / "console.log")
    with Saver(RunDir(tmp_path), config, console) as saver:
        saver.save(1, state_of(1.0))
    assert "Training goes on without this checkpoint" in capsys.readouterr().out


def test_other_failures_always_stop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "write_tensors", broken)
    with pytest.raises(OSError, match="Input/output"), make(on_full_disk="continue") as saver:
        saver.save(1, state_of(1.0))


def test_a_failure_does_not_hide_what_stopped_the_run(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_disk(monkeypatch)
    with pytest.raises(ZeroDivisionError), make() as saver:  # noqa: PT012
        saver.save(1, state_of(1.0))
        raise ZeroDivisionError
    assert "was not saved: No space left" in capsys.readouterr().out


def test_an_error_of_the_run_waits_for_the_save(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), make() as saver:  # noqa: PT012
        saver.save(1, state_of(1.0))
        raise ZeroDivisionError
    assert saved(tmp_path, 1) == (1.0, 1.0)


def test_someone_in_a_hurry_does_not_wait(make: Make, gate: threading.Event) -> None:
    with pytest.raises(KeyboardInterrupt), make() as saver:  # noqa: PT012
        saver.save(1, state_of(1.0))
        raise KeyboardInterrupt
    assert not gate.is_set()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_saves_what_lies_on_a_gpu(make: Make, tmp_path: Path) -> None:
    state = {"weight": torch.full((4,), 1.0, device="cuda"), "groups": [{"lr": 1.0}]}
    with make() as saver:
        saver.save(1, state)
        state["weight"] += 1
    assert saved(tmp_path, 1) == (1.0, 1.0)
