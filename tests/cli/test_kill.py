"""Runs that are killed, interrupted or out of disk, and then run again: every byte as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from step35.cli import main as cli
from step35.runtime import checkpoint

STAGES = ("prepare", "train", "sft", "rl", "eval")


class Killed(NamedTuple):
    """A run that was killed once in every stage and then left to finish."""

    path: Path
    code: int
    unfinished: dict[str, bool]
    """Was the stage still unfinished when its process was dead?"""


def tokenizer_is_ready(run: Path) -> bool:
    return (run / "data" / "steps.json").is_file()


def checkpoint_is_there(stage: str, step: int) -> Callable[[Path], bool]:
    return lambda run: (run / stage / "checkpoints" / f"step_{step}").is_dir()


def a_logged_step_is_not_saved(run: Path) -> bool:
    """The next run must take this step's record back, or it would be in the log twice."""
    log = run / "train" / "metrics.jsonl"
    return checkpoint_is_there("train", 2)(run) and log.read_bytes().count(b"\n") == 3


def one_model_is_evaluated(run: Path) -> bool:
    return (run / "eval.json").is_file()


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "prepare": tokenizer_is_ready,
    "train": a_logged_step_is_not_saved,
    "sft": checkpoint_is_there("sft", 3),  # the later MTP modules have joined
    "rl": checkpoint_is_there("rl", 1),
    "eval": one_model_is_evaluated,
}
LAST_FILES = {
    "prepare": "data/prepare.json",
    "train": "train/done.json",
    "sft": "sft/done.json",
    "rl": "rl/done.json",
    "eval": "summary.json",
}


@pytest.fixture(scope="module")
def killed(process: Any, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    path = tmp_path_factory.mktemp("killed") / "run"
    unfinished = {}
    for stage in STAGES:
        running: subprocess.Popen[bytes] = process.start("demo", "--out", str(path), *process.demo_flags)
        try:
            process.wait_until(lambda stage=stage: MOMENTS[stage](path), running)
        finally:
            running.kill()
            running.wait()
        unfinished[stage] = not (path / LAST_FILES[stage]).exists()
    code = process.start("demo", "--out", str(path), *process.demo_flags).wait(timeout=600)
    return Killed(path, code, unfinished)


def records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a log without what a clock put there."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_s")} for line in lines]


def test_every_stage_was_really_stopped_halfway(killed: Killed) -> None:
    assert killed.unfinished == dict.fromkeys(STAGES, True)
    assert killed.code == 0
    for stage in ("train", "sft", "rl"):
        events = [record["kind"] for record in records(killed.path / stage / "events.jsonl")]
        assert events == ["started", "started", "resumed", "finished"]


@pytest.mark.parametrize(
    "file",
    [
        "data/tokenizer/tokenizer.json",
        "data/train/shard_00000.bin",
        "data/val/shard_00000.bin",
        "sft/conversations.jsonl",
        "rl/rollouts/step_0.jsonl",
        "rl/rollouts/step_1.jsonl",
        "train/model/model-00001-of-00001.safetensors",
        "sft/model/model-00001-of-00001.safetensors",
        "rl/model/model-00001-of-00001.safetensors",
        "export/model-00001-of-00001.safetensors",
        "export/config.json",
    ],
)
def test_files_are_those_of_an_unbroken_run(killed: Killed, unbroken: Any, file: str) -> None:
    assert (killed.path / file).read_bytes() == (unbroken.path / file).read_bytes()


@pytest.mark.parametrize("stage", ["train", "sft", "rl"])
def test_logs_are_those_of_an_unbroken_run(killed: Killed, unbroken: Any, stage: str) -> None:
    found = records(killed.path / stage / "metrics.jsonl")
    assert found == records(unbroken.path / stage / "metrics.jsonl")


def test_results_are_those_of_an_unbroken_run(killed: Killed, unbroken: Any) -> None:
    found, expected = (json.loads((run / "eval.json").read_text()) for run in (killed.path, unbroken.path))
    for part in ("accuracy", "accept_by_depth", "transcripts"):
        assert found[part] == expected[part]
    summary = json.loads((killed.path / "summary.json").read_text())
    clocks = ("seconds", "stage_seconds", "spec_speedup")
    assert {k: v for k, v in summary.items() if k not in clocks} == {
        k: v for k, v in unbroken.summary.items() if k not in clocks
    }


def test_nothing_of_the_killed_processes_is_left(killed: Killed) -> None:
    assert not list(killed.path.rglob("*.tmp*"))


def train_command(unbroken: Any, out: Path) -> list[str]:
    """Return `step35 train` with the data and the settings of the demo's own pre-training."""
    config = str(unbroken.path / "train" / "config.json")
    return ["train", "--config", config, "--data", str(unbroken.path / "data"), "--out", str(out)]


def trained(run: Path) -> bytes:
    return (run / "model" / "model-00001-of-00001.safetensors").read_bytes()


def test_ctrl_c_saves_and_the_next_run_continues(process: Any, unbroken: Any, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "output.txt"
    # Only Ctrl-C itself can write a checkpoint before the last step.
    command = [*train_command(unbroken, out), "--checkpoint-every", "100"]
    with open(log, "wb") as output:
        running: subprocess.Popen[bytes] = process.start(*command, output=output)
        try:
            process.wait_until(lambda: (out / "metrics.jsonl").is_file(), running)
            running.send_signal(signal.SIGINT)
            code = running.wait(timeout=120)
        finally:
            running.kill()
    assert code == 130, log.read_text()
    assert "run the same command again to continue" in log.read_text()
    assert "Traceback" not in log.read_text()
    [saved] = (out / "checkpoints").iterdir()
    done = len(records(out / "metrics.jsonl"))
    assert saved.name == f"step_{done}"
    assert done < 6
    event = records(out / "events.jsonl")[-1]
    assert (event["kind"], event["step"], event["signal"]) == ("interrupted", done, "SIGINT")
    assert process.start(*command).wait(timeout=300) == 0
    assert records(out / "events.jsonl")[-2] == {"kind": "resumed", "step": done}
    assert trained(out) == trained(unbroken.path / "train")


def test_sigterm_saves_and_exits_143_and_meanwhile_no_one_else_gets_in(
    process: Any, unbroken: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "run", tmp_path / "output.txt"
    command = [*train_command(unbroken, out), "--checkpoint-every", "2", "--steps", "100000"]
    with open(log, "wb") as output:
        running: subprocess.Popen[bytes] = process.start(*command, output=output)
        try:
            process.wait_until(lambda: checkpoint.latest(out / "checkpoints"), running)
            assert cli.main(command) == 75
            assert f"{out} is being written by process {running.pid} " in capsys.readouterr().err
            assert cli.main(["convert", str(out), str(tmp_path / "export"), "--dtype", "float32"]) == 0
            asked = time.monotonic()
            running.terminate()
            code = running.wait(timeout=120)
            took = time.monotonic() - asked
        finally:
            running.kill()
    assert code == 143, log.read_text()
    assert "terminated; run the same command again to continue" in log.read_text()
    event = records(out / "events.jsonl")[-1]
    assert (event["kind"], event["signal"]) == ("interrupted", "SIGTERM")
    # One step and one save; the rest is Python's own exit.
    assert event["seconds"] < took < 30
    restored = checkpoint.latest_state(out / "checkpoints")
    assert restored is not None
    assert restored.state["step"] == event["step"]
    assert generates(tmp_path / "export")


def generates(model: Path) -> bool:
    """Can the exported model be used as any other?"""
    return cli.main(["generate", str(model), "--prompt", "def f(", "--max-tokens", "4"]) == 0


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the disk fill up in the middle of the third checkpoint."""
    write = checkpoint.write_tensors

    def failing(folder: Path, tensors: Any) -> None:
        write(folder, tensors)
        if folder.name.startswith("step_3."):
            (folder / "__0_0.distcp").write_bytes(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_tensors", failing)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return monkeypatch


def test_a_full_disk_keeps_what_was_saved_and_the_next_run_continues(
    unbroken: Any, tmp_path: Path, full_disk: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = [*train_command(unbroken, out), "--checkpoint-every", "1"]
    assert cli.main(command) == 28
    error = capsys.readouterr().err
    assert "No space left to write" in error
    assert "step_3" in error
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_1", "step_2"]
    assert checkpoint.load(out / "checkpoints" / "step_2")["step"] == 2
    assert not (out / "model").exists()
    full_disk.undo()
    full_disk.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(command) == 0
    assert {"kind": "resumed", "step": 2} in records(out / "events.jsonl")
    assert trained(out) == trained(unbroken.path / "train")


def test_unreadable_text_is_skipped_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "good.txt").write_text("A text that can be read. " * 40, encoding="utf-8")
    (texts / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (texts / "binary.md").write_bytes(b"\x00\x01\x02")
    (texts / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (texts / "rows.jsonl").write_text('{"text": "A good row of its own."}\n{"text": \n{"label": 1}\n', encoding="utf-8")
    (texts / "image.png").write_bytes(b"\x89PNG")
    out = tmp_path / "data"
    flags = ["--vocab-size", "512", "--corpus-chars", "300000", "--val-tokens", "1024", "--context", "32"]
    assert cli.main(["prepare", "--out", str(out), "--extra", str(texts), *flags]) == 0
    sources = json.loads((out / "prepare.json").read_text(encoding="utf-8"))["sources"]
    named = [line for line in sources["skipped"] if str(texts) in line]
    bad = ["latin.txt: not UTF-8", "binary.md: contains null", "gone.txt: No such", "rows.jsonl:2: not JSON",
           "rows.jsonl:3: not an object", "image.png: suffix is not"]  # fmt: skip
    assert len(named) == len(bad)
    for reason in bad:
        assert sum(f"{texts}/{reason}" in line for line in named) == 1, reason
    assert sources["documents"]["text"] == 2


def test_text_that_does_not_exist_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.txt")
    assert cli.main(["prepare", "--out", str(tmp_path / "data"), "--extra", missing]) == 2
    assert missing in capsys.readouterr().err
