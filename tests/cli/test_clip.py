"""`step35 clip`: a checkpoint in, a clipped checkpoint out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from step35.cli import main as cli
from step35.model.weights import load_model


def test_a_checkpoint_is_clipped(micro_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "clipped"
    text.write_text("What is 12 * 34? Call the calculator. " * 40)
    command = ["clip", str(micro_checkpoint), str(out), "--text", str(text), "--context", "64"]
    assert cli.main([*command, "--tau", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "matrices clipped" in printed
    assert "layer 1, expert 0" in printed
    before, after = load_model(micro_checkpoint), load_model(out)
    assert after.layers[1].moe.experts.down_proj.norm() < before.layers[1].moe.experts.down_proj.norm()
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert cli.main([*command, "--tau", "0.01"]) == 2
    assert "exists; choose a new folder" in capsys.readouterr().err


def test_what_is_run_over_must_be_said(
    micro_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["clip", str(micro_checkpoint), str(tmp_path / "out"), "--tau", "1"]
    assert cli.main(command) == 2
    assert "--text FILE or --data FOLDER" in capsys.readouterr().err
    assert cli.main([*command, "--text", str(tmp_path / "none.txt")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    assert cli.main([*command, "--text", str(tmp_path / "empty.txt")]) == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".tmp", ".former"])
def test_nothing_of_the_users_is_removed(
    micro_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    text, mine = tmp_path / "text.txt", tmp_path / f"out{ending}"
    text.write_text("What is 12 * 34?")
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    command = ["clip", str(micro_checkpoint), str(tmp_path / "out"), "--text", str(text), "--tau", "1"]
    assert cli.main(command) == 2
    assert f"'{mine}' is in the way" in capsys.readouterr().err
    assert (mine / "notes.txt").read_text() == "mine"
