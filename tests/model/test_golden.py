"""Logits of two checkpoints in the released layout, as other implementations compute them in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from step35.model.weights import load_model


def assert_same(ours: Tensor, expected: np.ndarray, what: str) -> None:
    """Hold deviations to 1e-5 of the logits' standard deviation on average, 1e-4 at most, 1e-5 in norm."""
    theirs = torch.from_numpy(expected)
    assert ours.shape == theirs.shape, what
    deviation = (ours - theirs).abs() / theirs.std()
    assert deviation.mean() < 1e-5, what
    assert deviation.max() < 1e-4, what
    assert (ours - theirs).norm() / theirs.norm() < 1e-5, what


@pytest.mark.parametrize("name", ["tiny-a", "tiny-b"])
def test_logits_and_draft_logits_equal_the_reference(name: str, golden: Path) -> None:
    model = load_model(golden / name)
    cases = np.load(golden / name / "cases.npz")
    assert int(cases["n"]) >= 2
    for i in range(int(cases["n"])):
        ids = torch.from_numpy(cases[f"ids{i}"]).long()
        with torch.no_grad():
            output = model(ids[None], mtp=True)
        assert_same(output.logits[0], cases[f"logits{i}"], f"logits of case {i}")
        assert len(output.mtp_logits) == 3
        for k, logits in enumerate(output.mtp_logits):
            assert_same(logits[0, : len(ids) - 1 - k], cases[f"mtp{i}_{k}"], f"module {k} of case {i}")
