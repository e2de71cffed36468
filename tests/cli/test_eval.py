"""`eval`: what it measures of which checkpoint, and what it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from step35.cli import evaluation
from step35.cli import main as cli
from step35.model.weights import load_model, save_model
from step35.runtime.lock import locked

FLAGS = ["--problems", "3", "--samples", "2", "--speed-prompts", "1", "--max-turns", "1", "--max-turn-tokens", "4"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is really measured; the speed counts up, so that each measurement can be told."""
    done: list[str] = []
    accuracy = evaluation.accuracy

    def counted_accuracy(*arguments: Any, greedy: bool, **named: Any) -> Any:
        done.append("greedy" if greedy else "sampled")
        return accuracy(*arguments, greedy=greedy, **named)

    def compare(*arguments: Any, **named: Any) -> dict[str, Any]:
        done.append("speed")
        count = float(done.count("speed"))
        return {"plain_tokens_per_s": count, "speculative_tokens_per_s": 2 * count, "speedup": 2.0, "equal": True}

    monkeypatch.setattr(evaluation, "accuracy", counted_accuracy)
    monkeypatch.setattr(evaluation, "compare", compare)
    return done


def evaluate(folder: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert cli.main(["eval", str(folder), "--out", str(out), *FLAGS, *flags]) == 0
    found: dict[str, Any] = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    return found


def test_all_figures_are_written_and_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, micro_checkpoint: Path
) -> None:
    found = evaluate(micro_checkpoint, tmp_path / "eval")
    name = str(micro_checkpoint.resolve())
    records = {record["mode"]: record for record in found["accuracy"]}
    assert set(records) == {"greedy", "sampled"}
    assert all(record["n"] == 3 and record["model"] == name for record in records.values())
    assert len(found["accept_by_depth"][name]) == 2
    assert found["speed"]["equal"] is True
    assert {transcript["model"] for transcript in found["transcripts"]} == {name}
    shown = capsys.readouterr().out
    for figure in ("pass@1, greedy", "pass@1, sampled", "MTP acceptance", "plain", "speculative"):
        assert figure in shown


def test_a_second_run_measures_nothing_again(tmp_path: Path, micro_checkpoint: Path, measured: list[str]) -> None:
    first = evaluate(micro_checkpoint, tmp_path / "eval")
    assert measured == ["greedy", "sampled", "speed"]
    assert evaluate(micro_checkpoint, tmp_path / "eval") == first
    assert measured == ["greedy", "sampled", "speed"]


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_result_is_measured_again(
    tmp_path: Path, micro_checkpoint: Path, measured: list[str], content: str
) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "eval.json").write_text(content)
    evaluate(micro_checkpoint, tmp_path / "eval")
    assert measured == ["greedy", "sampled", "speed"]


def test_only_one_at_a_time(
    tmp_path: Path, micro_checkpoint: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval"
    out.mkdir()
    with locked(out):
        assert cli.main(["eval", str(micro_checkpoint), "--out", str(out), *FLAGS]) == 75
        assert f"{out} is being written by process" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == ["lock"]
    assert measured == []
    evaluate(micro_checkpoint, out)


def test_other_settings_measure_afresh(tmp_path: Path, micro_checkpoint: Path, measured: list[str]) -> None:
    evaluate(micro_checkpoint, tmp_path / "eval")
    found = evaluate(micro_checkpoint, tmp_path / "eval", "--seed", "1")
    assert measured == ["greedy", "sampled", "speed"] * 2
    assert len(found["accuracy"]) == 2


def test_another_checkpoint_gets_a_speed_of_its_own(
    tmp_path: Path, micro_checkpoint: Path, measured: list[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(micro_checkpoint, other)
    evaluate(micro_checkpoint, tmp_path / "eval")
    found = evaluate(other, tmp_path / "eval")
    assert measured == ["greedy", "sampled", "speed"] * 2
    assert found["speed"]["plain_tokens_per_s"] == 2.0


def test_a_checkpoint_written_anew_is_measured_anew(
    tmp_path: Path, micro_checkpoint: Path, measured: list[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(micro_checkpoint, folder)
    evaluate(folder, tmp_path / "eval")
    save_model(load_model(folder), folder, dtype="bfloat16")
    found = evaluate(folder, tmp_path / "eval")
    assert measured == ["greedy", "sampled", "speed"] * 2
    assert len(found["accuracy"]) == 2
