"""One writer a run: a lock that a second start meets, and that the kernel takes back from whoever dies.

`flock` belongs to an open file, so it goes with the process, however that ends; the file `lock` stays and means
nothing by itself. On network file systems it works as far as they pass `flock` on (NFS and Lustre can).
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from step35.errors import RunLockedError
from step35.runtime.disk import disk_errors

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which must exist. Raises `RunLockedError` when another process holds it."""
    path = folder / LOCK
    with disk_errors(path):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(
                f"{folder} is being written by {path.read_text(encoding='utf-8').strip() or 'another process'}. "
                "Wait for it, or stop it with `kill` and that number (training saves first), "
                "or choose another --out for a run of its own."
            ) from None
        with disk_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        yield
