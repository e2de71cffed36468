"""Killed anywhere, a run loses only the steps since its last checkpoint, and ends where an unbroken one ends."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from step35.config.checkpoint import CheckpointConfig
from step35.config.presets import s3f1
from step35.config.train import TrainConfig
from step35.data.packing import Batch
from step35.errors import DiskFullError
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.lock import locked
from step35.runtime.metrics import read_metrics
from step35.runtime.rundir import RunDir
from step35.runtime.signals import Terminated
from step35.train.trainer import train

STEPS = 12
CONFIG = TrainConfig(
    steps=STEPS, batch_rows=1, micro_rows=1, context=16, warmup_steps=2, lr=0.01, dtype="float32",
    checkpoint_every=2, monitor_every=5,
)  # fmt: skip
TERMINATED = 143
SAVING = "saving"
Start = Callable[..., BaseProcess]


class RandomRows:
    """Random tokens; before row `at`, the process is sent SIGTERM."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def rows(self, first: int, count: int) -> Batch:
        if first == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        tokens = np.random.default_rng(first).integers(0, 64, (count, 16))
        return Batch(tokens, np.zeros_like(tokens), np.ones_like(tokens, dtype=bool))


def run_in(folder: Path, pause: float = 0.0, at: int | None = None, **changes: Any) -> None:
    """Train in `folder` from wherever it is; each save takes `pause` seconds longer, half of them before the manifest.

    A save names its process in the file `saving` when it has its draft. Exits as the command line does.
    """
    torch.set_num_threads(1)
    write = checkpoint.write_tensors

    def slow(draft: Path, tensors: dict[str, Any]) -> None:
        (folder / SAVING).write_text(str(os.getpid()))
        time.sleep(pause / 2)
        write(draft, tensors)
        time.sleep(pause / 2)

    checkpoint.write_tensors = slow  # type: ignore[assignment]
    architecture = s3f1(
        layers=2, dense=1, mtp=1, heads=1, sliding_heads=1, groups=1, head_dim=16, vocab_size=64, hidden_size=32,
        intermediate_size=32, sliding_window=8, moe_num_experts=4, moe_top_k=2, moe_intermediate_size=16,
        share_expert_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = Step35(architecture)
    initialise(model, torch.Generator().manual_seed(0))
    run = RunDir(folder)
    try:
        with locked(folder):
            train(model, RandomRows(at), CONFIG.model_copy(update=changes), run, Console(), name="train")
    except Terminated:
        sys.exit(TERMINATED)
    finally:
        checkpoint.write_tensors = write


@pytest.fixture
def start(processes: ForkServerContext) -> Iterator[Start]:
    """Return a function that runs `run_in` in a process of its own; none outlives the test."""
    started: list[BaseProcess] = []

    def start(folder: Path, **settings: Any) -> BaseProcess:
        process = processes.Process(target=run_in, args=(folder,), kwargs=settings)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def wait_for(condition: Callable[[], object], process: BaseProcess) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.is_alive(), f"the process ended with {process.exitcode}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def draft(folder: Path) -> Path | None:
    return next((folder / "checkpoints").glob("step_*.tmp"), None)


def saving(folder: Path, process: BaseProcess) -> bool:
    """Has this process begun a save, so that a draft, if there is one, is its own and not one of its forerunners'?"""
    mark = folder / SAVING
    return mark.is_file() and mark.read_text() == str(process.pid)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run_in(folder)
    return folder


def assert_ends_like(folder: Path, unbroken: Path) -> None:
    assert losses(folder) == losses(unbroken)
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    plain, ours = checkpoint.take_apart(checkpoint.load(folder / "checkpoints" / f"step_{STEPS}"))
    expected, theirs = checkpoint.take_apart(checkpoint.load(unbroken / "checkpoints" / f"step_{STEPS}"))
    assert plain == expected  # position, monitors, the optimisers' numbers
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def kill(process: BaseProcess, folder: Path) -> bool:
    """Kill the process; check that the newest checkpoint is whole; return whether a save was under way.

    What is left stays as it is, for the next life to cope with.
    """
    process.kill()
    process.join()
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is None or checkpoint.load(newest)
    return saving(folder, process) and draft(folder) is not None


def test_killed_inside_saves(tmp_path: Path, start: Start, unbroken: Path) -> None:
    for attempt in range(3):
        process = start(tmp_path, pause=0.2)
        wait_for(partial(saving, tmp_path, process), process)
        time.sleep(0.06 * attempt)  # before, in and after the writing of the tensors
        assert kill(process, tmp_path)
    run_in(tmp_path)
    assert_ends_like(tmp_path, unbroken)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path: Path, start: Start, unbroken: Path) -> None:
    moments, inside, finished, lives = random.Random(0), 0, 0, []
    folder = tmp_path / "run_0"
    while len(lives) < 50:
        process = start(folder, pause=0.05, checkpoint_every=1)
        while len(lives) % 3 and process.is_alive() and not saving(folder, process):
            time.sleep(0.001)  # two lives of three end after their first save began, the others at any moment
        process.join(moments.uniform(0.0, 0.4))
        if process.exitcode == 0:  # it was faster than the killer: start another run
            assert_ends_like(folder, unbroken)
            finished += 1
            folder = tmp_path / f"run_{finished}"
            continue
        inside += kill(process, folder)
        newest = checkpoint.latest(folder / "checkpoints")
        lives.append(newest.name if newest else "none")
    run_in(folder)
    assert_ends_like(folder, unbroken)
    print(f"\n50 kills, {inside} with a save under way, {finished + 1} runs; newest after each: {' '.join(lives)}")
    assert inside > 10
    assert len(set(lives)) > 5


def test_sigterm_inside_a_step_saves_that_step(tmp_path: Path, start: Start, unbroken: Path) -> None:
    process = start(tmp_path, at=4)  # while the batch of the fifth step is being made
    process.join(60)
    assert process.exitcode == TERMINATED
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "step_5"
    [event] = read_metrics(tmp_path / "events.jsonl")
    assert (event["kind"], event["step"], event["signal"]) == ("interrupted", 5, "SIGTERM")
    run_in(tmp_path)
    assert_ends_like(tmp_path, unbroken)


def test_sigterm_inside_a_save_waits_for_it_and_saves_again(tmp_path: Path, start: Start, unbroken: Path) -> None:
    process = start(tmp_path, pause=0.3, checkpoint_every=3)
    wait_for(lambda: draft(tmp_path), process)
    asked = time.monotonic()
    process.terminate()
    process.join(60)
    assert time.monotonic() - asked < 10  # two saves of 0.3 s, and steps of some milliseconds
    assert process.exitcode == TERMINATED
    assert draft(tmp_path) is None
    restored = checkpoint.latest_state(tmp_path / "checkpoints")
    assert restored is not None
    assert restored.state["step"] == losses(tmp_path)[-1][0]
    run_in(tmp_path)
    assert_ends_like(tmp_path, unbroken)


def test_a_second_sigterm_does_not_wait(tmp_path: Path, start: Start, unbroken: Path) -> None:
    process = start(tmp_path, pause=60)
    wait_for(lambda: draft(tmp_path), process)
    for _ in range(2):
        process.terminate()
        time.sleep(0.2)
    process.join(10)
    assert process.exitcode == -signal.SIGTERM
    run_in(tmp_path)
    assert_ends_like(tmp_path, unbroken)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    run_in(tmp_path / "sized", steps=1)
    size = sum(file.stat().st_size for file in (tmp_path / "sized" / "checkpoints" / "step_1").iterdir())
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def no_foresight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find out that the disk is full by writing to it, as happens when something else fills it meanwhile."""
    monkeypatch.setattr(checkpoint, "_check_space", lambda target, size: None)


def test_a_disk_that_fills_up_stops_the_run(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_foresight(monkeypatch)
    with pytest.raises(DiskFullError, match=r"No space left to write .*step_4"):
        run_in(small_disk, checkpoints=CheckpointConfig(keep=1, background=False))  # the log needs room, too
    restored = checkpoint.latest_state(small_disk / "checkpoints")
    assert restored is not None
    assert (restored.path.name, restored.skipped) == ("step_2", {})
    assert draft(small_disk) is None
    assert read_metrics(small_disk / "events.jsonl")[-1]["kind"] == "checkpoint_failed"


def test_a_disk_that_fills_up_need_not_stop_the_run(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_foresight(monkeypatch)
    settings = CheckpointConfig(keep=1, on_full_disk="continue", background=False)  # the log needs room, too
    run_in(small_disk, checkpoints=settings)
    assert losses(small_disk) == losses(unbroken)
    assert capsys.readouterr().out.count("Training goes on without this checkpoint") == STEPS // 2 - 1
    restored = checkpoint.latest_state(small_disk / "checkpoints")
    assert restored is not None
    assert restored.path.name == "step_2"


def test_a_disk_without_a_byte_left_stops_at_the_log_and_loses_nothing_saved(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Path
) -> None:
    def filled(target: Path, size: int) -> None:
        if target.name == "step_4":
            with suppress(OSError), open(small_disk / "other", "wb", buffering=0) as other:
                while True:
                    other.write(b"x" * 4096)

    monkeypatch.setattr(checkpoint, "_check_space", filled)
    folder, settings = small_disk / "run", CheckpointConfig(on_full_disk="continue", background=False)
    with pytest.raises(DiskFullError, match=r"write .*metrics\.jsonl"):
        run_in(folder, monitor_every=1, checkpoints=settings)
    assert checkpoint.latest(folder / "checkpoints") == folder / "checkpoints" / "step_2"
    monkeypatch.undo()
    shutil.copytree(folder, tmp_path / "larger")
    run_in(tmp_path / "larger")
    assert_ends_like(tmp_path / "larger", unbroken)
