"""Checkpoints published by rename: `step_N` either is whole or does not exist, and damage done later is found.

`step_N/` holds the tensors (`runtime/dcp.py`), `state.json` with all other values (`runtime/state.py`) and
`manifest.json` with a checksum of every file (`runtime/manifest.py`). `runtime/saver.py` writes them in the background.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from step35.errors import CheckpointError, DiskFullError
from step35.runtime.dcp import read_tensors, write_tensors
from step35.runtime.disk import disk_errors, free_bytes, sync_directory, write_text
from step35.runtime.manifest import MANIFEST, DamagedError, read_manifest, verify, write_manifest
from step35.runtime.state import put_together, take_apart

STATE = "state.json"
FORMAT = "step35 checkpoint 1"
BAD = ".bad"
REPLACED = ".tmp-old"
"""Ending of a checkpoint that makes room for a new one of the same step."""
GONE = ".tmp-gone"
"""Ending of a checkpoint that is being deleted."""
MARGIN_BYTES = 2**20


class Restored(NamedTuple):
    """A loaded checkpoint, and the newer ones that were passed over, each with the reason."""

    path: Path
    state: dict[str, Any]
    skipped: dict[Path, str]


def save(root: Path, step: int, state: dict[str, Any], *, keep: int = 2, keep_every: int | None = None) -> Path:
    """Write `root/step_N` and return its path; older ones leave as `keep` and `keep_every` say.

    Raises `DiskFullError`, in which case the earlier checkpoints are as they were, and `TypeError` for
    a value that a checkpoint does not hold.
    """
    plain, tensors = take_apart(state)
    return write(root, step, plain, tensors, keep=keep, keep_every=keep_every)


def write(
    root: Path, step: int, plain: Any, tensors: dict[str, Tensor], *, keep: int = 2, keep_every: int | None = None
) -> Path:
    """Write a state that has been taken apart; see `save`."""
    target = root / f"step_{step}"
    draft = root / f"{target.name}.tmp"
    with disk_errors(target):
        _put_back(root)
        _remove_drafts(root)  # first, since a draft of a killed run may be what fills the disk
        _check_space(target, sum(tensor.nbytes for tensor in tensors.values()))
        try:
            draft.mkdir(parents=True)
            write_tensors(draft, tensors)
            write_text(draft / STATE, json.dumps(plain))
            write_manifest(draft, format=FORMAT, step=step, torch=torch.__version__)
            _publish(draft, target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        _retire(root, target, keep, keep_every)
    return target


def latest(root: Path) -> Path | None:
    """Return the newest checkpoint under `root`, not yet verified, or None. It changes nothing: the run may be live."""
    return next(iter(_published(root)), None)


def load(path: Path) -> dict[str, Any]:
    """Return the verified state saved at `path`, on the CPU.

    Raises `DamagedError` for one that is lost, any other `CheckpointError` for one that only this process cannot read.
    """
    _verify(path)
    try:
        state = put_together(json.loads((path / STATE).read_text(encoding="utf-8")), read_tensors(path))
    except Exception as error:  # whatever a library raises for what this version did not write
        raise _unreadable(path, error) from error
    return state  # type: ignore[no-any-return]


def load_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the verified tensors whose names begin with `prefix`, without it; such as "model/". See `load`."""
    _verify(path)
    try:
        return read_tensors(path, prefix)
    except Exception as error:
        raise _unreadable(path, error) from error


def latest_state(root: Path, *, before: int | None = None) -> Restored | None:
    """Load the newest checkpoint that is not damaged, of a step below `before` if given; None if there is none at all.

    For the process that writes the run, since it finishes what a killed one left half done. Raises `CheckpointError`
    if there are some but all are damaged: starting anew in silence would lose them. So it does if the newest is
    undamaged and still cannot be read: passing it over would lose its steps for a reason that may be gone tomorrow.
    """
    skipped: dict[Path, str] = {}
    _put_back(root)
    for path in _published(root):
        if before is not None and _step(path) >= before:
            continue
        try:
            return Restored(path, load(path), skipped)
        except DamagedError as error:
            skipped[path] = str(error)
    if skipped:
        raise CheckpointError(f"No checkpoint under {root} can be read:\n" + "\n".join(skipped.values()))
    return None


def discard(path: Path) -> None:
    """Take a checkpoint out of the running: it becomes `step_N.bad` and is never chosen again.

    It stays to be looked at until one of the same or a later step is discarded.
    """
    for old in _folders(path.parent, BAD):
        if _step(old) <= _step(path):
            shutil.rmtree(old, ignore_errors=True)
    path.rename(path.with_name(path.name + BAD))
    sync_directory(path.parent)


def _published(root: Path) -> list[Path]:
    """Return the published checkpoints, newest first; one whose replacement has not come yet is still one."""
    by_step = {_step(path): path for path in [*_folders(root, REPLACED), *_folders(root)]}
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def _folders(root: Path, ending: str = "") -> list[Path]:
    """Return the folders called `step_N` and `ending`."""
    name = re.compile(rf"step_\d+{re.escape(ending)}")
    return [path for path in root.glob(f"step_*{ending}") if name.fullmatch(path.name) and path.is_dir()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0])


def _verify(path: Path) -> None:
    if (path / "state.pt").is_file():
        raise CheckpointError(
            f"{path} was written by an older version (state.pt), which this one does not read; "
            "finish the run with that version, or start a run of its own (another --out)."
        )
    if not (path / MANIFEST).is_file():
        raise DamagedError(
            f"{path} is not a checkpoint: {path / MANIFEST} is missing; give a folder such as checkpoints/step_100."
        )
    manifest = read_manifest(path)
    found = str(manifest.get("format"))
    if found == FORMAT:
        verify(path, manifest)
    elif re.fullmatch(r"step35 checkpoint \d+", found):
        raise CheckpointError(
            f"{path} has the format {found!r}, this version reads {FORMAT!r}. Use the version that wrote it, "
            "or move that folder away to go on from an earlier checkpoint."
        )
    else:
        raise DamagedError(f"{path} has the format {found!r}, which no version writes.")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0][:200] if str(error) else ""
    return CheckpointError(
        f"{path} is undamaged, but cannot be read ({type(error).__name__}: {reason}). Mend that and try again, "
        "or move that folder away to go on from an earlier checkpoint."
    )


def _check_space(target: Path, size: int) -> None:
    # Before the first byte: a disk that a checkpoint fills to the brim fails the run's logs as well.
    needed, free = size + size // 100 + MARGIN_BYTES, free_bytes(target)
    if free < needed:
        raise DiskFullError(
            f"No space left to write {target}: it takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. "
            "Earlier checkpoints are intact: free some space and run the same command again."
        )


def _publish(draft: Path, target: Path) -> None:
    if target.exists():  # a replayed step; a folder cannot be renamed over one with content
        target.rename(target.with_name(target.name + REPLACED))
    draft.rename(target)
    sync_directory(target.parent)
    _remove_drafts(target.parent)


def _put_back(root: Path) -> None:
    """Give a checkpoint its name back whose replacement never came: the process was killed between two renames."""
    for old in _folders(root, REPLACED):
        target = old.with_name(old.name.removesuffix(REPLACED))
        if not target.exists():
            old.rename(target)
            sync_directory(root)


def _remove_drafts(root: Path) -> None:
    for draft in root.glob("step_*.tmp*"):
        shutil.rmtree(draft, ignore_errors=True)


def _retire(root: Path, newest: Path, keep: int, keep_every: int | None) -> None:
    """Delete what the policy does not keep: neither among the newest `keep` nor at a multiple of `keep_every`.

    The name goes first, so that a kill halfway leaves no published checkpoint without its files.
    """
    for old in _published(root)[keep:]:
        if old != newest and not (keep_every and _step(old) % keep_every == 0):
            old.rename(old.with_name(old.name + GONE))
    sync_directory(root)
    _remove_drafts(root)
