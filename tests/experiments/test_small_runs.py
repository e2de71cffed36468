"""The experiments' parts do what they say, and a run of two steps writes its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import balance
import blow_up
import collapse
from corpus import A, Corpus
from small_run import rounded, small_model, small_training, train_small
from step35.model.step35 import Step35
from step35.train.weight_clipping import largest_products


def test_a_recorded_loss_is_the_mean_since_the_record_before() -> None:
    arguments: dict[str, Any] = {"corpus": Corpus(), "record": lambda model, figures: {"loss": figures["loss"]}}
    train = small_training(steps=4, batch_rows=2, micro_rows=2, context=16)
    single = train_small(small_model(), train, every=1, **arguments)
    double = train_small(small_model(), train, every=2, **arguments)
    assert single["step"] == [1, 2, 3, 4]
    assert double["step"] == [2, 4]
    expected = [sum(single["loss"][:2]) / 2, sum(single["loss"][2:]) / 2]
    assert double["loss"] == pytest.approx(expected, rel=1e-6)


def test_weight_clipping_leaves_no_product_above_tau(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def largest(model: Step35, figures: dict[str, Any]) -> float:
        probe = Corpus(bigram_share=blow_up.BIGRAM_SHARE).batch(blow_up.PROBE_STEP, 8, 128)
        products = largest_products(model, [probe])[blow_up.FIRST_MOE]
        seen.append(float(products[:2].max()))  # gate and up of the first MoE layer: nothing before them is clipped
        return 0.0

    monkeypatch.setattr(blow_up, "CLIP_EVERY", 2)
    monkeypatch.setattr(blow_up, "tokens_of_bigram", lambda model, batch, figures: largest(model, figures))
    blow_up.run(steps=2, every=2, seed=0)
    tau = seen[0] / 2
    blow_up.run(steps=2, every=2, seed=0, tau=tau)
    assert seen[1] == pytest.approx(tau, rel=1e-4)


def test_the_late_expert_is_told_by_its_output_beside_the_median_of_those_with_tokens() -> None:
    figures = {
        "loss": 1.0,
        "expert_output": [[9.0, 9.0, 9.0, 9.0], [0.0, 4.0, 2.0, 3.0]],
        "expert_up_norm": [[1.0] * 4, [1.0, 2.0, 1.0, 5.0]],
        "clip_share.layer_3": 0.25,
    }
    found = blow_up.late_expert(figures)
    assert found == {"loss": 1.0, "max": 4.0, "median": 3.0, "weight_ratio": 5.0, "clip_share": 0.25}


def test_tokens_of_the_loudest_expert_are_all_a_when_all_tokens_are() -> None:
    model = Step35(small_model())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    batch = Corpus().batch(0, 2, 16)
    batch.tokens.fill(A)
    shares = [
        blow_up.tokens_of_bigram(model, batch, {"expert_output": [[float(e == expert) for e in range(16)]]})
        for expert in range(16)
    ]
    assert set(shares) == {0.0, 1.0}  # idle experts, and those that all tokens choose


def test_a_collapsed_expert_is_quiet_but_busy() -> None:
    layer = {"expert_rms": [[1.0, 1.0, 1.0, 0.05]], "expert_load": [[0.25, 0.25, 0.25, 0.25]]}
    rest = dict.fromkeys(("loss", "load_cv", "dead_experts", "expert_norm_min_ratio"), 0.0)
    found = collapse.health(Step35(small_model()), rest | layer)
    assert (found["collapsed_experts"], found["rms_min_to_median"]) == (1, 0.05)
    idle = layer | {"expert_load": [[0.4, 0.4, 0.19, 0.01]]}
    found = collapse.health(Step35(small_model()), rest | idle)
    assert (found["collapsed_experts"], found["rms_min_to_median"]) == (0, 1.0)


def test_results_are_rounded_wherever_they_stand() -> None:
    assert rounded({"a": [1.23456, (2, 0.000123456)], "b": "x"}) == {"a": [1.235, [2, 0.0001235]], "b": "x"}


@pytest.mark.parametrize(("script", "runs"), [(blow_up, 4), (collapse, 3), (balance, 4)])
def test_two_steps_write_figures_and_curves(
    script: ModuleType, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, "--steps", "2", "--every", "1", "--out", str(tmp_path)])
    script.main()
    result = json.loads((tmp_path / f"{script.__name__}.json").read_text())
    assert result["findings"] == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["curves"]) == runs
    assert all(curves["step"] == [1, 2] for curves in result["curves"].values())
    assert (tmp_path / f"{script.__name__}.png").stat().st_size > 10_000
    assert {"command", "environment", "settings"} <= result.keys()
