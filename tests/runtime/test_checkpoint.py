from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from step35.errors import CheckpointError, DiskFullError
from step35.runtime import checkpoint, manifest


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


def test_two_saves_of_one_state_have_the_same_bits(tmp_path):
    for name in ("a", "b"):
        checkpoint.save(tmp_path / name, 7, state_of(7))
    files = [(tmp_path / name / "step_7" / "__0_0.distcp").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_load_tensors_takes_a_part(tmp_path):
    path = checkpoint.save(tmp_path, 7, state_of(7))
    found = checkpoint.load_tensors(path, "model/")
    assert sorted(found) == ["half", "weight"]
    assert torch.equal(found["weight"], torch.full((3, 4), 7.0))
    assert checkpoint.load_tensors(path, "actor/") == {}


def test_keeps_multiples_for_ever(tmp_path):
    for step in range(1, 12):
        checkpoint.save(tmp_path, step, state_of(step), keep=2, keep_every=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11", "step_4", "step_8"]


def test_keeps_the_newest_by_number(tmp_path):
    for step in (8, 9, 10, 100):
        checkpoint.save(tmp_path, step, state_of(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_100"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_100"


@pytest.mark.parametrize("replaced", [False, True])
def test_all_is_on_the_disk_before_it_counts_and_before_anything_is_deleted(
    tmp_path: Path, order: list[tuple[str, int | str]], replaced: bool
) -> None:
    checkpoint.save(tmp_path, 2 if replaced else 1, state_of(1), keep=1)
    order.clear()
    target = checkpoint.save(tmp_path, 2, state_of(2), keep=1)
    published = order.index(("rename", str(target)))
    assert sorted(path.name for path in target.iterdir()) == sorted(FILES)
    for path in (target, *target.iterdir()):
        assert ("flush", path.stat().st_ino) in order[:published], path
    inside = [place for place, (what, path) in enumerate(order) if what == "rename" and f"{target}.tmp/" in str(path)]
    assert ("flush", target.stat().st_ino) in order[max(inside) : published]  # the folder, after its last file
    flushed = ("flush", tmp_path.stat().st_ino)
    assert order[published + 1] == flushed
    ending = "2.tmp-old" if replaced else "1.tmp-gone"
    moved, deleted = (order.index((what, str(tmp_path / f"step_{ending}"))) for what in ("rename", "delete"))
    assert flushed in order[moved:deleted]
    assert published < deleted


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
    draft = checkpoint.save(tmp_path, 2, state_of(2)).rename(tmp_path / "step_2.tmp")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_1"
    restored = checkpoint.latest_state(tmp_path)
    assert restored is not None
    assert restored.path.name == "step_1"
    checkpoint.save(tmp_path, 3, state_of(3))
    assert not draft.exists()


class Killed(BaseException):
    """The end of a process."""


def killed(*given: Any) -> None:
    raise Killed


@pytest.mark.parametrize("first", ["read", "save"])
def test_killed_while_a_step_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    checkpoint.save(tmp_path, 4, state_of(4), keep=1)
    rename = Path.rename

    def dying(path: Path, target: Path) -> Path:
        if target.name == "step_4":  # the old one has made room, the new one is not there yet
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying)
        patched.setattr(checkpoint.shutil, "rmtree", lambda *given, **named: None)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, 4, state_of(5), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_4.tmp", "step_4.tmp-old"]
    newest = checkpoint.latest(tmp_path)  # what another process sees, which must not touch anything
    assert newest is not None
    assert checkpoint.load(newest)["optimizer"][0]["step"] == 4
    if first == "read":
        restored = checkpoint.latest_state(tmp_path)
        assert restored is not None
        assert restored.path == tmp_path / "step_4"
    monkeypatch.setattr(checkpoint, "write_tensors", killed)
    with pytest.raises(Killed):
        checkpoint.save(tmp_path, 6, state_of(6), keep=1)
    assert checkpoint.load(tmp_path / "step_4")["optimizer"][0]["step"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["step_4"]


def test_killed_while_an_old_one_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, state_of(1), keep=1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda folder, **named: (folder / "state.json").unlink())
    checkpoint.save(tmp_path, 2, state_of(2), keep=1)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2  # not all of the old one is gone
    assert [path.name for path in tmp_path.glob("step_?")] == ["step_2"]
    checkpoint.save(tmp_path, 3, state_of(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, wrapped):
    checkpoint.save(tmp_path, 1, state_of(1), keep=1)

    def full(tensor: Any, stream: Any) -> None:
        stream.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if wrapped:  # as torch's zip writer reports it
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904
            raise

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskFullError, match="step_2"):
        checkpoint.save(tmp_path, 2, state_of(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert checkpoint.load(tmp_path / "step_1")["note"] == "text"


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state_of(1))
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 2**20)
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *given: pytest.fail("began to write"))
    with pytest.raises(DiskFullError, match=r"step_2: it takes 1\.0 MB, and 1\.0 MB are free"):
        checkpoint.save(tmp_path, 2, state_of(2))


FILES = ("__0_0.distcp", ".metadata", "state.json", "manifest.json")


def flip(content: bytes) -> bytes:
    """Change one bit in the middle."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone"])
def test_damaged_newest_falls_back_and_says_so(tmp_path: Path, name: str, damage: str) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    file = checkpoint.save(tmp_path, 2, state_of(2)) / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[: len(content) // 2], "flipped": flip(content), "empty": b""}[damage])
    restored = checkpoint.latest_state(tmp_path)
    assert restored is not None
    path, state, skipped = restored
    assert path == tmp_path / "step_1"
    assert state["optimizer"][0]["step"] == 1
    [(passed_over, reason)] = skipped.items()
    assert passed_over == tmp_path / "step_2"
    assert name in reason or damage == "flipped"  # in the manifest, a flipped bit may accuse any file


def refuse_to_read(lost: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    real = manifest.crc32

    def crc32(file: Path) -> str:
        if file == lost:
            raise error
        return real(file)

    monkeypatch.setattr(manifest, "crc32", crc32)


def test_a_file_that_the_disk_does_not_give_back_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    lost = checkpoint.save(tmp_path, 2, state_of(2)) / "__0_0.distcp"
    refuse_to_read(lost, OSError(errno.EIO, os.strerror(errno.EIO)), monkeypatch)
    restored = checkpoint.latest_state(tmp_path)
    assert restored is not None
    assert restored.path.name == "step_1"
    assert restored.skipped == {lost.parent: f"{lost} cannot be read (Input/output error)."}


@pytest.mark.parametrize("why", ["open files", "memory", "newer format"])
def test_what_is_not_damage_is_said_and_passes_over_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    newest = checkpoint.save(tmp_path, 2, state_of(2))
    if why == "open files":
        refuse_to_read(newest / "state.json", OSError(errno.EMFILE, os.strerror(errno.EMFILE)), monkeypatch)
        message = r"state\.json cannot be read \(Too many open files\)"
    elif why == "memory":
        read = checkpoint.read_tensors
        monkeypatch.setattr(checkpoint, "read_tensors", lambda path: bytearray(2**62) if path == newest else read(path))
        message = r"step_2 is undamaged, but cannot be read \(MemoryError"
    else:
        content = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(json.dumps({"format": "step35 checkpoint 2", "parts": content["files"]}))
        message = r"step_2 has the format 'step35 checkpoint 2', this version reads 'step35 checkpoint 1'"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.latest_state(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path):
    (checkpoint.save(tmp_path, 2, state_of(2)) / "state.json").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="step_2"):
        checkpoint.latest_state(tmp_path)


def test_a_discarded_checkpoint_is_not_chosen_again(tmp_path):
    paths = [checkpoint.save(tmp_path, step, state_of(step), keep=9) for step in (1, 2, 3)]
    for path in (paths[1], paths[2]):
        checkpoint.discard(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_3.bad"]
    restored = checkpoint.latest_state(tmp_path)
    assert restored is not None
    assert restored.path == paths[0]
    assert restored.skipped == {}
    checkpoint.save(tmp_path, 3, state_of(3), keep=9)  # replayed
    assert checkpoint.latest(tmp_path) == paths[2]


def test_an_older_one_discarded_later_does_not_delete_the_newest(tmp_path):
    def discard_all() -> list[str]:
        for step in (3, 2):  # in the order in which a resume passes them over
            checkpoint.discard(checkpoint.save(tmp_path, step, state_of(step), keep=9))
        return sorted(path.name for path in tmp_path.iterdir())

    assert discard_all() == discard_all() == ["step_2.bad", "step_3.bad"]


def test_latest_before_a_step(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state_of(step), keep=9)
    restored = checkpoint.latest_state(tmp_path, before=3)
    assert restored is not None
    assert restored.path.name == "step_2"
    assert checkpoint.latest_state(tmp_path, before=1) is None


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.load(tmp_path)
    path = checkpoint.save(tmp_path, 1, state_of(1))
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(content | {"format": "another"}))
    with pytest.raises(CheckpointError, match="has the format 'another'"):
        checkpoint.load(path)


def test_a_checkpoint_of_an_older_version_is_named_not_ignored(tmp_path):
    (tmp_path / "step_5").mkdir()
    torch.save(state_of(5), tmp_path / "step_5" / "state.pt")
    with pytest.raises(CheckpointError, match="older version"):
        checkpoint.latest_state(tmp_path)


@pytest.mark.parametrize("value", [numpy.float64(1.0), {1, 2}, object()])
def test_refuses_what_load_would_refuse(tmp_path, value):
    with pytest.raises(TypeError, match="optimizer/0/lr is a"):
        checkpoint.save(tmp_path, 1, {"optimizer": [{"lr": value}]})
    assert not (tmp_path / "step_1").exists()
