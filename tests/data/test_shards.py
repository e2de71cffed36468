"""Shards: round trip, and every way in which a folder may be unfinished or damaged."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from step35.data.shards import ShardWriter, TokenShards
from step35.errors import DataError, DiskFullError

DOCUMENTS = [[1, 2, 3], [4, 5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15]]
STREAM = [token for document in DOCUMENTS for token in document]


def write(folder: Path, *, vocab_size: int = 100, shard_tokens: int = 5) -> Path:
    with ShardWriter(folder, vocab_size, shard_tokens) as writer:
        for number, document in enumerate(DOCUMENTS):
            writer.add(document, "even" if number % 2 == 0 else "odd")
    return folder


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(2**16, 2), (2**16 + 1, 4)])
def test_round_trip_across_shards(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    shards = TokenShards(write(tmp_path, vocab_size=vocab_size))
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == [f"shard_0000{n}.bin" for n in range(3)]
    assert (tmp_path / "shard_00000.bin").stat().st_size == 3 * itemsize
    assert shards.total_tokens == len(STREAM)
    assert shards.vocab_size == vocab_size
    assert shards.document_starts.tolist() == [0, 3, 7, 8]
    assert shards.tokens_by_source == {"even": 4, "odd": 11}
    for start in range(len(STREAM) + 1):
        for length in range(len(STREAM) - start + 1):
            assert shards.slice(start, length).tolist() == STREAM[start : start + length]
    shards.verify()


def test_largest_id_survives(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 2**16) as writer:
        writer.add([2**16 - 1], "text")
    assert TokenShards(tmp_path).slice(0, 1).tolist() == [2**16 - 1]


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 16), (15, 1), (3, -1)])
def test_slice_outside_the_stream_is_refused(tmp_path: Path, start: int, length: int) -> None:
    with pytest.raises(IndexError):
        TokenShards(write(tmp_path)).slice(start, length)


@pytest.mark.parametrize("token", [-1, 100, 2**16])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, token: int) -> None:
    writer = ShardWriter(tmp_path, 100)
    with pytest.raises(DataError, match=str(token)):
        writer.add([5, token], "text")


def test_interrupted_write_is_not_complete(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 100, 2) as writer:  # noqa: PT012
        for document in DOCUMENTS:
            writer.add(document, "text")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no finished"):
        TokenShards(tmp_path)


def test_killed_write_over_older_shards_is_not_complete(tmp_path: Path) -> None:
    write(tmp_path)
    writer = ShardWriter(tmp_path, 100, 2)
    writer.add(DOCUMENTS[0], "text")
    writer.add(DOCUMENTS[1], "text")  # one shard is on disk now; the process dies here
    assert list(tmp_path.glob("shard_*"))
    with pytest.raises(DataError, match="no finished"):
        TokenShards(tmp_path)


def test_truncated_shard_is_detected(tmp_path: Path) -> None:
    path = write(tmp_path) / "shard_00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard_00001\.bin has 9 bytes instead of 10"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("name", ["shard_00001.bin", "shard_00001.documents.npy"])
def test_missing_file_is_detected(tmp_path: Path, name: str) -> None:
    (write(tmp_path) / name).unlink()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        TokenShards(tmp_path)


def test_changed_bytes_fail_verification(tmp_path: Path) -> None:
    path = write(tmp_path) / "shard_00002.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DataError, match="shard_00002"):
        TokenShards(tmp_path).verify()


@pytest.mark.parametrize("change", [{"version": 99}, {"total_tokens": 14}])
def test_wrong_index_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    path = write(tmp_path) / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="damaged"):
        TokenShards(tmp_path)


def test_full_disk_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # the first shard with its two arrays still fitted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFullError, match=r"shard_00001\.bin \([\d.,]+ MB free"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_device_raises_disk_full(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 100)
    writer.add(np.arange(50), "text")
    (tmp_path / "shard_00000.bin.partial").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match="shard_00000"):
        writer.close()
    assert list(tmp_path.iterdir()) == []
