"""Checkpoints published by rename: `step_N` either is complete or does not exist.

A state is a dictionary of tensors, numbers, strings, lists and dictionaries, so that loading runs no pickled
code. Sharded checkpoints of a cluster are not here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from step35.errors import CheckpointError
from step35.runtime.disk import disk_errors, sync_directory

STATE = "state.pt"
PLAIN = (bool, int, float, str, type(None))


class Restored(NamedTuple):
    """A loaded checkpoint, and why newer ones were passed over."""

    path: Path
    state: dict[str, Any]
    skipped: list[str]


def save(root: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `root/step_N` and keep only the newest `keep` checkpoints; return its path.

    Raises `DiskFullError`, in which case the earlier checkpoints are as they were, and `TypeError` for
    a value that `load` would refuse.
    """
    _check_plain(state, "state")
    target = root / f"step_{step}"
    draft = root / f"{target.name}.tmp-{os.getpid()}"
    with disk_errors(target):
        _remove_drafts(root)  # first, since a draft of a killed run may be what fills the disk
        try:
            draft.mkdir(parents=True)
            _write(draft / STATE, state)
            _publish(draft, target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    for old in _complete(root)[max(keep, 1) :]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def latest(root: Path) -> Path | None:
    """Return the newest complete checkpoint under `root`, or None."""
    return next(iter(_complete(root)), None)


def load(path: Path) -> dict[str, Any]:
    """Return the state saved at `path`, on the CPU, mapped from the file. Raises `CheckpointError`."""
    file = path / STATE
    if not file.is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint: {file} is missing; give a folder such as checkpoints/step_100."
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a different class for each way in which a file can be damaged
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read ({reason}); delete {path} to resume from the one before."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not a dictionary; it was not written by step35.")
    return state


def latest_state(root: Path) -> Restored | None:
    """Load the newest readable checkpoint; None if there is none at all.

    Raises `CheckpointError` if there are some but none can be read: starting anew in silence would lose it.
    """
    skipped: list[str] = []
    for path in _complete(root):
        try:
            return Restored(path, load(path), skipped)
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(f"No checkpoint under {root} can be read:\n" + "\n".join(skipped))
    return None


def _complete(root: Path) -> list[Path]:
    """Return the published checkpoints, newest first."""
    found = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _write(file: Path, state: dict[str, Any]) -> None:
    with open(file, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    sync_directory(file.parent)


def _publish(draft: Path, target: Path) -> None:
    if target.exists():  # a replayed step; a folder cannot be renamed over one with content
        target.rename(draft.with_name(f"{target.name}.tmp-old-{os.getpid()}"))
    draft.rename(target)
    sync_directory(target.parent)
    _remove_drafts(target.parent)


def _remove_drafts(root: Path) -> None:
    for draft in root.glob("step_*.tmp-*"):
        shutil.rmtree(draft, ignore_errors=True)


def _check_plain(value: Any, where: str) -> None:
    # Exact types: a numpy float is a float to isinstance, but its pickle is code that `load` refuses.
    if isinstance(value, torch.Tensor) or type(value) in PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            _check_plain(key, f"{where} key {key!r}")
            _check_plain(inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{where}[{index}]")
    else:
        raise TypeError(
            f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, text, lists, dicts."
        )
