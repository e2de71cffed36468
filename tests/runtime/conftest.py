"""A record of the order in which a writer flushes, renames and deletes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

Order = list[tuple[str, int | str]]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Order:
    """Return a growing list of ("flush", inode), ("rename", new path) and ("delete", path of a folder).

    Inodes, since what is flushed under a draft's name keeps its own when it is renamed.
    """
    done: Order = []

    def watch(module: Any, name: str, entry: Any) -> None:
        real = getattr(module, name)

        def watched(*given: Any, **named: Any) -> Any:
            done.append(entry(*given))
            return real(*given, **named)

        monkeypatch.setattr(module, name, watched)

    watch(os, "fsync", lambda descriptor: ("flush", os.fstat(descriptor).st_ino))
    for name in ("rename", "replace"):
        watch(os, name, lambda old, new: ("rename", str(Path(new))))
    watch(shutil, "rmtree", lambda folder, *given: ("delete", str(folder)))
    return done
