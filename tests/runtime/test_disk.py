"""Files that are whole under their final name, also after a power loss."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from step35.runtime.disk import publish, write_text


@pytest.mark.parametrize("how", ["publish", "write_text"])
def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, order: list[tuple[str, int | str]], how: str
) -> None:
    file = tmp_path / "file"
    if how == "publish":
        publish(file, lambda temporary: temporary.write_text("whole"))
    else:
        write_text(file, "whole")
    inode, folder = file.stat().st_ino, tmp_path.stat().st_ino
    assert order == [("flush", inode), ("rename", str(file)), ("flush", folder)]


def test_a_file_that_cannot_be_filled_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError):
        publish(file, lambda temporary: temporary.write_text("half") / 0)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_published_file_may_be_read_like_any_other(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.unlink()
        path.touch(0o600)

    former = os.umask(0o022)
    try:
        publish(tmp_path / "weights", write)
    finally:
        os.umask(former)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o644
