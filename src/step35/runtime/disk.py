"""Writing files so that a kill or a full disk leaves whole files only.

Every writer of the run directory goes through here. A file is written beside its place, flushed to the disk
and moved over the old one, so a reader sees the old or the new content and never a half of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from step35.errors import ConfigError, DiskFullError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" below this block into `DiskFullError` naming `path`.

    A place that cannot be written, such as a file where a folder belongs, becomes a `ConfigError`.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place.") from None
    except (OSError, RuntimeError) as error:
        if not _is_disk_full(error):
            raise
        free_mb = free_bytes(path) / 1e6
        raise DiskFullError(
            f"No space left to write {path} ({free_mb:,.1f} MB free). What was written before is intact: "
            "free some space, or choose another --out, and run the same command again."
        ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    # torch.save hides the OSError behind a RuntimeError of its zip writer, so the whole chain is searched.
    # EFBIG is a limit set on the process (ulimit -f).
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, empty when there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds `path`, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def sync_directory(path: Path) -> None:
    """Flush the directory entries, so that a rename inside `path` survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush what was written to `path` so far to the disk; a file that does not exist needs none."""
    if path.exists():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def fingerprint(path: Path) -> str:
    """Return a hash of a file, or of the files in a folder: names, sizes, first and last MiB; "" when there is none.

    Times do not count, so a copy has the fingerprint of the original, and large weights take no time.
    """
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            return ""
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''}:{size};".encode())
        with open(file, "rb") as content:
            digest.update(content.read(2**20))
            content.seek(max(0, size - 2**20))
            digest.update(content.read())
    return digest.hexdigest()[:16]


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, flush and rename it, so that a file under its final name is always whole.

    Others may read it as they may any new file, whatever `write` thinks (safetensors lets nobody but the owner).
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:  # some file systems refuse any change
            temporary.chmod(mode)
        sync_file(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` in one step. Raises `DiskFullError`."""
    draft = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with disk_errors(path):
            with open(draft, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
            sync_directory(path.parent)
    finally:
        draft.unlink(missing_ok=True)
