"""Tensors in DCP's format, and a table of contents that cannot run code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from step35.errors import CheckpointError
from step35.runtime import checkpoint
from step35.runtime.dcp import read_tensors, write_tensors
from step35.runtime.manifest import write_manifest

TENSORS = {
    "a/matrix": torch.arange(12.0).view(3, 4),
    "a/transposed": torch.arange(6).view(2, 3).t(),
    "a/slice": torch.arange(10.0)[2:4],
    "b/scalar": torch.tensor(3.5, dtype=torch.float64),
    "b/empty": torch.empty(0, 5),
    "b/half": torch.tensor([1.5], dtype=torch.float16),
    "b/brain": torch.tensor([1.5], dtype=torch.bfloat16),
    "b/eight": torch.tensor([1.5]).to(torch.float8_e4m3fn),
    "b/flags": torch.tensor([True, False]),
}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double()), name


@pytest.mark.filterwarnings("error")
def test_round_trip(tmp_path: Path) -> None:
    write_tensors(tmp_path / "new", TENSORS)
    assert_same(read_tensors(tmp_path / "new"), TENSORS)
    part = {name.removeprefix("b/"): tensor for name, tensor in TENSORS.items() if name.startswith("b/")}
    assert_same(read_tensors(tmp_path / "new", "b/"), part)


def test_torchs_own_loader_reads_it(tmp_path: Path) -> None:
    write_tensors(tmp_path / "new", TENSORS)
    found = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(found, checkpoint_id=tmp_path / "new", no_dist=True)
    assert_same(found, TENSORS)


class Trap:
    """What unpickles by running a command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.proof),)


def test_a_table_of_contents_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": torch.ones(2)})
    (path / "manifest.json").unlink()
    (path / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    write_manifest(path, format=checkpoint.FORMAT)  # as someone with an aim would
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()
