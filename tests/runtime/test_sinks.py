"""Trackers follow the log: read back from what they wrote themselves, over resumes, rollbacks and failures."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from step35.errors import Step35Error
from step35.runtime import sinks
from step35.runtime.metrics import scalars
from step35.runtime.rundir import RunDir
from step35.runtime.sinks import SINKS, tracking


def session(path: Path, kind: str, first: int, last: int, *, add: float = 0.0) -> list[str]:
    """Resume the run after step `first`, log up to `last` (the loss is the step plus `add`); return the warnings."""
    warnings: list[str] = []
    run = RunDir(path)
    with tracking(run, [kind], {"lr": 0.1}, warnings.append):
        run.metrics.truncate_after(first)
        for step in range(first + 1, last + 1):
            run.metrics.log(step, loss=step + add, mtp_loss=[1.0, 2.0])
    return warnings


def tensorboard_curve(path: Path, key: str = "loss") -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_scalars_of_a_record():
    record = {
        "step": 3, "time": 1.0, "loss": 2, "bad": "nan", "note": "text", "ok": True, "none": None, "moe_layers": [1, 2],
        "mtp_loss": [0.5, "inf"], "rms": [[1.0, 5.0], [2.0, "nan"]], "empty": [], "dead": [["nan"]],
    }  # fmt: skip
    curves = scalars(record)
    assert math.isnan(curves.pop("bad"))
    assert curves == {
        "loss": 2, "mtp_loss/1": 0.5, "mtp_loss/2": math.inf, "rms/min": 1, "rms/median": 2, "rms/max": 5
    }  # fmt: skip


def test_tensorboard_shows_a_resumed_run_as_one_that_never_stopped(tmp_path):
    pytest.importorskip("tensorboard")
    assert session(tmp_path, "tensorboard", 0, 6) == []
    session(tmp_path, "tensorboard", 4, 8, add=0.5)  # as after a rollback: steps 5 and 6 come out otherwise
    assert tensorboard_curve(tmp_path) == [*((n, float(n)) for n in range(1, 5)), *((n, n + 0.5) for n in range(5, 9))]
    assert tensorboard_curve(tmp_path, "mtp_loss/2") == [(n, 2.0) for n in range(1, 9)]


def test_a_rollback_within_a_session(tmp_path):
    pytest.importorskip("tensorboard")
    run = RunDir(tmp_path)
    with tracking(run, ["tensorboard"], {}, pytest.fail):
        for step in (1, 2, 3):
            run.metrics.log(step, loss=1.0)
        run.metrics.truncate_after(1)
        run.metrics.log(2, loss=9.0)
    assert tensorboard_curve(tmp_path) == [(1, 1.0), (2, 9.0)]
    assert run.metrics.followers == []


def test_a_tracker_asked_for_late_gets_the_whole_history(tmp_path):
    pytest.importorskip("tensorboard")
    run = RunDir(tmp_path)
    for step in range(1, 5):
        run.metrics.log(step, loss=float(step))
    session(tmp_path, "tensorboard", 4, 5)
    assert tensorboard_curve(tmp_path) == [(n, float(n)) for n in range(1, 6)]


class Appending:
    """A tracker that can only append, as trackio and wandb; refuses what its service would show twice."""

    extra = "fake"
    shown: list[tuple[str, int]]

    def __init__(self, run: Path, name: str, settings: dict[str, Any]) -> None:
        self.name = name

    def send(self, step: int, values: dict[str, float]) -> None:
        assert (self.name, step) not in self.shown
        if values["loss"] == 13:
            raise ConnectionError("no route")
        self.shown.append((self.name, step))

    def rewind(self, step: int, sent: int) -> int:
        return sent

    def close(self) -> None:
        pass


@pytest.fixture
def appending(monkeypatch: pytest.MonkeyPatch) -> type[Appending]:
    Appending.shown = []
    monkeypatch.setitem(SINKS, "json", Appending)  # a name that can be imported
    return Appending


def test_an_appending_tracker_gets_no_step_twice_under_one_name(tmp_path, appending):
    session(tmp_path, "json", 0, 6)
    session(tmp_path, "json", 4, 8)
    assert [step for _, step in appending.shown] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len({name for name, _ in appending.shown}) == 1
    assert json.loads((tmp_path / "track.json").read_text())["json"]["step"] == 8


def test_a_failing_tracker_warns_once_and_catches_up_at_the_next_resume(tmp_path, appending):
    [warning] = session(tmp_path, "json", 0, 14, add=3.0)  # fails at step 10
    assert "json failed" in warning
    assert "no route" in warning
    records = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 14  # the truth is whole
    [event] = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["kind"], event["tracker"]) == ("tracker_failed", "json")
    (tmp_path / "metrics.jsonl").write_text("".join(line.replace("13.0", "13.5") + "\n" for line in records))
    assert session(tmp_path, "json", 14, 15) == []
    assert [step for _, step in appending.shown] == list(range(1, 16))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_tracker_that_fails_on_a_full_disk_does_not_stop_the_run(tmp_path, appending):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    [warning] = session(tmp_path, "json", 12, 14)  # fails at step 13
    assert "json failed" in warning
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "5", "[1]", '{"json": 5}', '{"json": {"name": 1, "step": "x"}}', '{"json": {"name": "a"}}'],
)
def test_a_damaged_cursor_is_none(tmp_path, appending, content):
    (tmp_path / "track.json").write_text(content)
    assert session(tmp_path, "json", 0, 3) == []
    assert [step for _, step in appending.shown] == [1, 2, 3]
    assert json.loads((tmp_path / "track.json").read_text())["json"] == {"name": appending.shown[0][0], "step": 3}


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path, appending, monkeypatch):
    monkeypatch.setattr(appending, "__init__", lambda self, *args: 1 / 0)
    [warning] = session(tmp_path, "json", 0, 3)
    assert "ZeroDivisionError" in warning
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_missing_tracker_names_its_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Step35Error, match=r"pip install \"step35\[wandb\]\""):
        session(tmp_path, "wandb", 0, 1)


def test_trackers_may_change_when_a_run_is_resumed(tmp_path):
    run = RunDir(tmp_path)
    run.write_config({"lr": 0.1, "train": {"track": []}})
    run.check_config({"lr": 0.1, "train": {"track": ["wandb"]}, "track": ["tensorboard"]})


@pytest.mark.slow
def test_trackio(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "store")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "store")
    session(tmp_path / "run", "trackio", 0, 6)
    session(tmp_path / "run", "trackio", 4, 8)
    [store] = (tmp_path / "store").glob("*.db")
    rows = sqlite3.connect(store).execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert [step for _, step, _ in rows] == list(range(1, 9))
    assert len({name for name, _, _ in rows}) == 1
    assert json.loads(rows[-1][2])["loss"] == 8


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert session(tmp_path / "run", "wandb", 0, 6) == []
    begun = int(time.time())
    while int(time.time()) == begun:  # wandb names a session's folder by the second, and overwrites
        time.sleep(0.01)
    assert session(tmp_path / "run", "wandb", 4, 8) == []
    deadline = time.monotonic() + 30
    while (steps := wandb_steps(tmp_path / "run")) != list(range(1, 9)):  # its service writes on after `finish`
        assert time.monotonic() < deadline, steps
        time.sleep(0.05)
    assert len({folder.name.split("-", 3)[3] for folder in (tmp_path / "run" / "wandb").glob("offline-*")}) == 1


def wandb_steps(run: Path) -> list[int]:
    """Return the steps with a loss in the order of a run's sessions."""
    records = [record for file in sorted(run.glob("wandb/offline-*/*.wandb")) for record in scan(file)]
    return [int(float(record["_step"])) for record in records if "loss" in record]


def scan(file: Path) -> list[dict[str, str]]:
    """Return the history records of a wandb file, values as JSON text.

    The file is a LevelDB log behind a header of 7 bytes: chunks of (crc 4, length 2, type 1), none over the border of a
    block of 32 KiB; type 1 is a whole record, 2, 3 and 4 are first, middle and last parts.
    """
    from wandb.proto import wandb_internal_pb2

    content, place, record, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record = (b"" if kind in (1, 2) else record) + content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record.FromString(record)
            found.append({item.key or item.nested_key[0]: item.value_json for item in message.history.item})
    return found


def test_every_tracker_of_the_settings_has_a_sink():
    from typing import get_args

    from step35.config.base import Trackers

    assert set(get_args(get_args(Trackers)[0])) == set(sinks.SINKS)
