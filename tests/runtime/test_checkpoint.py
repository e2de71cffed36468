from __future__ import annotations

import errno

import numpy
import pytest
import torch

from step35.errors import CheckpointError, DiskFullError
from step35.runtime import checkpoint


def state_of(step: int) -> dict:
    return {
        "model": {"weight": torch.full((3, 4), float(step)), "half": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": [{"step": step, "lr": 0.1, "names": ("a", None)}],
        "note": "text",
    }


def test_round_trip(tmp_path):
    path = checkpoint.save(tmp_path, 7, state_of(7))
    assert path == tmp_path / "step_7"
    state = checkpoint.load(path)
    assert torch.equal(state["model"]["weight"], torch.full((3, 4), 7.0))
    assert state["model"]["half"].dtype == torch.bfloat16
    assert state["optimizer"] == [{"step": 7, "lr": 0.1, "names": ("a", None)}]
    assert state["note"] == "text"


def test_keeps_the_newest_by_number(tmp_path):
    for step in (8, 9, 10, 100):
        checkpoint.save(tmp_path, step, state_of(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_100"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_100"


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 1, state_of(1))
    checkpoint.save(tmp_path, 1, state_of(5))
    assert checkpoint.load(tmp_path / "step_1")["optimizer"][0]["step"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_nothing_saved(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.latest_state(tmp_path / "none") is None


def test_drafts_of_a_killed_run_are_ignored_and_removed(tmp_path):
    checkpoint.save(tmp_path, 1, state_of(1))
    draft = tmp_path / "step_2.tmp-12345"
    draft.mkdir()
    torch.save(state_of(2), draft / "state.pt")
    (tmp_path / "step_9").mkdir()  # a folder without a state is no checkpoint
    assert checkpoint.latest(tmp_path) == tmp_path / "step_1"
    restored = checkpoint.latest_state(tmp_path)
    assert restored is not None
    assert restored.path.name == "step_1"
    checkpoint.save(tmp_path, 3, state_of(3))
    assert not draft.exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, wrapped):
    checkpoint.save(tmp_path, 1, state_of(1), keep=1)

    def full(state, stream):
        stream.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if wrapped:  # as torch's zip writer reports it
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904
            raise

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(DiskFullError, match="step_2"):
        checkpoint.save(tmp_path, 2, state_of(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert checkpoint.load(tmp_path / "step_1")["note"] == "text"


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
def test_damaged_newest_falls_back_and_says_so(tmp_path, damage):
    checkpoint.save(tmp_path, 1, state_of(1))
    file = checkpoint.save(tmp_path, 2, state_of(2)) / "state.pt"
    content = file.read_bytes()
    file.write_bytes({"truncate": content[: len(content) // 2], "garbage": b"x" * 500, "empty": b""}[damage])
    restored = checkpoint.latest_state(tmp_path)
    assert restored is not None
    path, state, skipped = restored
    assert path == tmp_path / "step_1"
    assert state["optimizer"][0]["step"] == 1
    assert len(skipped) == 1
    assert "step_2" in skipped[0]


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path):
    file = checkpoint.save(tmp_path, 2, state_of(2)) / "state.pt"
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="step_2"):
        checkpoint.latest_state(tmp_path)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.load(tmp_path)
    torch.save([1, 2], tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="list"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("value", [numpy.float64(1.0), {1, 2}, object()])
def test_refuses_what_load_would_refuse(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['optimizer'\]\[0\]\['lr'\]"):
        checkpoint.save(tmp_path, 1, {"optimizer": [{"lr": value}]})
    assert not (tmp_path / "step_1").exists()
