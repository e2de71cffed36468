"""The first signal is held, the second is not."""

from __future__ import annotations

import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from step35.runtime.metrics import read_metrics
from step35.runtime.rundir import RunDir
from step35.runtime.signals import Terminated, interruptible

WATCHED = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_the_first_signal_waits_for_the_step(tmp_path: Path, number: signal.Signals, raised: type) -> None:
    before = [signal.getsignal(each) for each in WATCHED]
    with pytest.raises(KeyboardInterrupt) as caught, interruptible() as interrupted:  # noqa: PT012
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted()
        interrupted.leave(RunDir(tmp_path), 5)
    assert caught.type is raised
    assert [signal.getsignal(each) for each in WATCHED] == before
    [event] = read_metrics(tmp_path / "events.jsonl")
    assert (event["kind"], event["step"], event["signal"]) == ("interrupted", 5, number.name)
    assert 0 <= event["seconds"] < 5


def test_the_event_names_the_checkpoint_that_is_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (run.checkpoints / "step_4").mkdir(parents=True)
    with pytest.raises(Terminated), interruptible() as interrupted:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        interrupted.leave(run, 5)  # whose own checkpoint found no room
    [event] = read_metrics(tmp_path / "events.jsonl")
    assert (event["step"], event["checkpoint"]) == (5, "step_4")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_does_not_change_how_it_ends(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(Terminated), interruptible() as interrupted:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        interrupted.leave(RunDir(tmp_path), 5)


@pytest.mark.parametrize("number", WATCHED)
def test_ctrl_c_after_any_signal_interrupts_at_once(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():  # noqa: PT012
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")


def terminate_twice() -> None:
    with interruptible():
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)


def test_a_second_sigterm_ends_the_process_at_once(processes: ForkServerContext) -> None:
    process = processes.Process(target=terminate_twice)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGTERM


def test_a_signal_that_nobody_looked_at_is_raised_at_the_end() -> None:
    with pytest.raises(Terminated), interruptible():
        signal.raise_signal(signal.SIGTERM)
