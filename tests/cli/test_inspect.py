"""`inspect`: presets and folders, tables and JSON, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from step35.cli import main as cli
from step35.cli.shipped import SHIPPED
from step35.model.weights import load_model


def test_a_preset_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "flash", "--context", "1000", "2000"]) == 0
    shown = capsys.readouterr().out
    for figure in ("196,956,130,368", "10,931,407,936", "routed experts", " 1,000 ", " 2,000 "):
        assert figure in shown
    assert "32,768" not in shown


def test_a_checkpoint_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(SHIPPED), "--context", "64", "--weights", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    held = sum(tensor.numel() for tensor in load_model(SHIPPED).state_dict().values())
    assert found["total"] == held == sum(part["total"] for part in found["parts"])
    assert found["weight_bytes"] == 4 * held
    assert [c["context"] for c in found["costs"]] == [64]


def test_what_is_neither_preset_nor_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["inspect", "flsh"]) == 2
    assert "neither a preset" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "is not a checkpoint folder" in capsys.readouterr().err


def test_json_needs_no_torch() -> None:
    code = (
        "import sys; from step35.cli import main; main.main(['inspect', 'flash', '--json']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
