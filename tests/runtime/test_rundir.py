from __future__ import annotations

import errno
import json
import os

import pytest

from step35.errors import ConfigError, DiskFullError
from step35.runtime import disk
from step35.runtime.rundir import RunDir

CONFIG = {"steps": 10, "model": {"layers": 4, "sizes": (1, 2)}}


def test_how_a_run_is_saved_may_change(tmp_path):
    run = RunDir(tmp_path)
    run.write_config({"lr": 1.0, "checkpoints": {"keep": 2}})
    run.check_config({"lr": 1.0, "checkpoints": {"keep": 1}})
    run.check_config({"lr": 1.0})  # as an older version wrote it
    with pytest.raises(ConfigError, match=r"lr: 1\.0 in the folder, 2\.0 now"):
        run.check_config({"lr": 2.0, "checkpoints": {"keep": 1}})


def test_what_follows_from_an_alarm_may_change_also_within_a_recipe(tmp_path):
    def settings(action: str, lr: float = 1.0) -> dict:
        return {"stages": [{"train": {"lr": lr, "stability": {"non_finite": {"action": action}}}}, {"tokens": 5}]}

    run = RunDir(tmp_path)
    run.write_config(settings("stop"))
    run.check_config(settings("skip"))
    with pytest.raises(ConfigError, match=r"stages\.0\.train\.lr: 1\.0 in the folder, 2\.0 now"):
        run.check_config(settings("skip", lr=2.0))


def test_writes_config_and_environment(tmp_path):
    run = RunDir(tmp_path / "runs" / "a")
    run.write_config(CONFIG)
    run.write_env()
    assert json.loads((run.path / "config.json").read_text()) == {
        "steps": 10,
        "model": {"layers": 4, "sizes": [1, 2]},
    }
    env = json.loads((run.path / "env.json").read_text())
    assert env["cores"] >= 1
    assert env["memory_bytes"] > 1e8
    assert env["torch"]
    assert env["python"]


def test_writing_leaves_no_drafts(tmp_path):
    run = RunDir(tmp_path)
    run.write_json("a.json", {"text": "é"})
    run.write_json("a.json", {"text": "second"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text())["text"] == "second"


def test_same_config_may_resume(tmp_path):
    run = RunDir(tmp_path)
    run.check_config(CONFIG)  # nothing there yet
    run.write_config(CONFIG)
    run.check_config(CONFIG)


def test_other_config_names_keys_values_and_remedy(tmp_path):
    run = RunDir(tmp_path)
    run.write_config(CONFIG)
    with pytest.raises(ConfigError) as caught:
        run.check_config({"steps": 20, "model": {"layers": 6}})
    text = str(caught.value)
    for part in (
        "steps: 10",
        "20 now",
        "model.layers: 4",
        "6 now",
        "model.sizes",
        "--out",
        "delete the folder",
        str(tmp_path),
    ):
        assert part in text


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.write_config(CONFIG)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"config\.json .*MB free.*--out"):
        run.write_config({"steps": 11})
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_disk_errors_finds_a_wrapped_cause_and_passes_others(tmp_path):
    wrapped = RuntimeError("writer failed")
    wrapped.__context__ = OSError(errno.ENOSPC, "full")
    with pytest.raises(DiskFullError), disk.disk_errors(tmp_path / "not" / "there"):
        raise wrapped
    with pytest.raises(ConfigError, match=r"cannot be written \(no\)"), disk.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(OSError, match="broken"), disk.disk_errors(tmp_path):
        raise OSError(errno.EIO, "broken")
    with pytest.raises(RuntimeError, match="other"), disk.disk_errors(tmp_path):
        raise RuntimeError("other")
