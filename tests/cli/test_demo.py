"""The whole pipeline through the command line, with settings that take seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import step35
from step35.cli import evaluation, stages
from step35.cli import main as cli
from step35.data import prepare as prepare_module

# The models of the fixture are shared: nothing here may change them.


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_it_finishes_and_sums_up(unbroken: Any) -> None:
    assert unbroken.code == 0, unbroken.output
    summary = unbroken.summary
    numbers = ["val_loss", "unigram_loss", "bigram_loss", "acc_sft", "acc_rl", "spec_speedup", "seconds"]
    for name in numbers:
        assert math.isfinite(summary[name]), name
    assert summary["spec_equal"] is True
    assert summary["seed"] == 0
    assert len(summary["accept_by_depth"]) == 3
    assert all(0 <= rate <= 1 for rate in summary["accept_by_depth"])
    assert summary["bigram_loss"] < summary["unigram_loss"] < math.log(600)
    assert summary["val_loss"] < math.log(600)  # below guessing: it has learned something
    assert "Traceback" not in unbroken.output


def test_its_figures_are_those_of_its_stages(unbroken: Any) -> None:
    summary, path = unbroken.summary, unbroken.path
    records = [json.loads(line) for line in (path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert summary["val_loss"] == pytest.approx(records[-1]["val_loss"], rel=1e-5)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    prepared, evaluated = read(path / "data" / "prepare.json"), read(path / "eval.json")
    assert summary["bigram_loss"] == prepared["bigram_loss"]
    assert summary["unigram_loss"] == prepared["unigram_loss"]
    assert summary["spec_speedup"] == evaluated["speed"]["speedup"]
    assert summary["accept_by_depth"] == evaluated["accept_by_depth"]["rl"]
    assert {(r["model"], r["mode"], r["n"]) for r in evaluated["accuracy"]} == {
        (model, mode, 4) for model in ("sft", "rl") for mode in ("greedy", "sampled")
    }


def test_sft_trains_later_modules_from_the_step_they_join(unbroken: Any) -> None:
    records = [json.loads(line) for line in (unbroken.path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [len(record["mtp_loss"]) for record in records] == [1, 1, 3, 3, 3, 3]


def test_it_leaves_a_run_that_can_be_read_and_repeated(unbroken: Any) -> None:
    path = unbroken.path
    assert read(path / "env.json")["python"]
    assert read(path / "config.json")["train"]["steps"] == 6
    assert "step35 demo in" in (path / "console.log").read_text(encoding="utf-8")
    report = (path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert "cannot be shown" not in report
    assert sorted(file.name for file in (path / "rl" / "rollouts").iterdir()) == ["step_0.jsonl", "step_1.jsonl"]
    assert not list(path.rglob("*.tmp*"))


def test_the_export_is_a_checkpoint_that_others_can_read(unbroken: Any) -> None:
    export = unbroken.path / "export"
    names = {file.name for file in export.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "chat_template.jinja" in names
    assert read(export / "tokenizer_config.json")["chat_template"]
    assert any(name.endswith(".safetensors") for name in names)
    config = read(export / "config.json")
    assert (config["architectures"], config["torch_dtype"]) == (["Step3p5ForCausalLM"], "bfloat16")
    assert config["num_nextn_predict_layers"] == 3
    assert config["vocab_size"] == 600
    assert read(export / "generation_config.json")["eos_token_id"] == [1, 3]


def test_the_export_reloads_as_the_trained_model(unbroken: Any) -> None:
    exported, trained = (step35.load_model(unbroken.path / folder) for folder in ("export", "rl/model"))
    for (name, tensor), expected in zip(trained.state_dict().items(), exported.state_dict().values(), strict=True):
        assert torch.equal(tensor.bfloat16(), expected.bfloat16()), name
    llm = step35.LLM(unbroken.path / "export")
    message = llm.chat([{"role": "user", "content": "What is 2 + 3?"}], params=step35.SamplingParams(max_tokens=4))
    assert message["role"] == "assistant"


def run_again(demo: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Run the demo in this process; fail when a stage works instead of using what is there."""

    def work(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a finished stage works again")

    for module, name in (
        (stages, "train"),
        (stages, "fine_tune"),
        (stages, "reinforce"),
        (stages, "publish"),
        (prepare_module, "collect"),
        (prepare_module, "train_tokenizer"),
        (prepare_module, "encode_mixture"),
        (prepare_module, "unigram_bigram"),
        (evaluation, "accuracy"),
        (evaluation, "acceptance"),
        (evaluation, "compare"),
    ):
        monkeypatch.setattr(module, name, work)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["demo", "--out", str(demo.path), *arguments]) == 0


def test_a_second_run_does_no_work_again(unbroken: Any, process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_again(unbroken, monkeypatch, process.demo_flags)
    seconds = read(unbroken.path / "summary.json")["seconds"]
    assert read(unbroken.path / "summary.json") == {**unbroken.summary, "seconds": seconds}


def test_a_second_run_leaves_the_summary_as_it_is(unbroken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_again(unbroken, monkeypatch, ["--config", str(unbroken.path / "config.json")])
    assert read(unbroken.path / "summary.json") == unbroken.summary


def test_other_settings_do_not_overwrite_a_run(unbroken: Any, process: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = (unbroken.path / "config.json").read_bytes()
    assert cli.main(["demo", "--out", str(unbroken.path), *process.demo_flags, "--rl.steps", "9"]) == 2
    error = capsys.readouterr().err
    assert "rl.steps: 2 in the folder, 9 now" in error
    assert "delete the folder" in error
    assert (unbroken.path / "config.json").read_bytes() == before


def test_a_full_disk_is_found_before_anything_is_spent(
    tmp_path: Path, process: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from step35.cli import demo

    monkeypatch.setattr(demo, "free_bytes", lambda path: 10**6)
    assert cli.main(["demo", "--out", str(tmp_path / "run"), *process.demo_flags]) == 28
    assert "1 MB free" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()
