"""Recipes: what follows from them, and what is refused before a run of weeks starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.cli.recipe import architecture
from step35.config.load import load_file
from step35.config.presets import preset
from step35.config.recipe import RecipeConfig, with_theta
from step35.config.train import TrainConfig
from step35.errors import ConfigError

FLASH = Path(__file__).parents[2] / "recipes" / "flash.toml"
T, B = 10**12, 10**9


def recipe(*stages: dict[str, Any], **values: Any) -> RecipeConfig:
    return RecipeConfig.parse({"preset": "tiny", "stages": list(stages), **values}, where="recipe")


def refusal(*stages: dict[str, Any], **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe(*stages, **values)
    return str(caught.value)


def stage(name: str = "one", **values: Any) -> dict[str, Any]:
    return {"name": name, "tokens": 10_000, "mixture": {"web": 1.0}, **values}


def test_the_reports_run_is_verbatim() -> None:
    found = load_file(FLASH, RecipeConfig)
    trained = {s.name: found.training(s) for s in found.stages}
    assert [(s.name, s.tokens) for s in found.stages] == [
        ("pretrain-1", 14_600 * B), ("pretrain-2a", 2 * T), ("pretrain-2b", T),
        ("midtrain-1", 386 * B), ("midtrain-2", 364 * B), ("sft", 7_230_000_000),
    ]  # fmt: skip
    assert [c.context for c in trained.values()] == [4096, 4096, 32768, 32768, 131072, 131072]
    assert [(c.lr, c.final_lr) for c in trained.values()] == [
        (2.5e-4, 5e-5), (5e-5, 2e-5), (2e-5, 2e-5), (2e-5, 2e-5), (2e-5, 7.3e-6), (1e-5, 5e-6)
    ]  # fmt: skip
    for s, theta in zip(found.stages, (1e4, 1e4, 1e6, 1e6, 5e6, 5e6), strict=True):  # what the model is built with
        layers = architecture(found, s, 128_896).layers()
        assert {(la.window is None, la.rope_theta, la.rope_scaling) for la in layers} == {
            (True, theta, None), (False, 1e4, None)
        }  # fmt: skip
        assert s.mask_meta_from_tokens == (None if s.conversations else 3_800 * B)
    assert [c.decay for c in trained.values()] == ["cosine", "cosine", "constant", "constant", "cosine", "cosine"]
    assert [(c.balance_rate, c.final_balance_rate) for c in trained.values()] == [
        (0.001, None), (0.001, 0.0), *[(0.0, None)] * 4
    ]  # fmt: skip
    assert [c.batch_rows for c in trained.values()] == [16384, 16384, 2048, 2048, 512, 32]
    assert trained["pretrain-1"].warmup_steps == 2000
    assert 400 * B <= trained["pretrain-1"].tokens_until(trained["pretrain-1"].phases[-1][0]) < 400.1 * B
    assert [c.mtp_weight for c in trained.values()] == [0.3, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert [c.freeze_router for c in trained.values()] == [False] * 3 + [True] * 3
    assert [c.ep_weight for c in trained.values()] == [0.001] * 3 + [0.0] * 3
    assert [rows for _, rows in trained["pretrain-1"].phases] == [4096, 8192, 12288, 16384]
    assert {(c.weight_decay, c.grad_clip, c.optim.kind) for c in trained.values()} == {(0.1, 1.0, "muon")}
    for s in found.stages:
        config = trained[s.name]
        assert 0 <= config.tokens_until(config.steps) - s.tokens < config.batch_rows * config.context
    assert trained["midtrain-1"].warmup_steps == math.ceil(0.03 * trained["midtrain-1"].steps)
    assert found.weights(found.stages[3])["web"] == pytest.approx(0.21 * 0.25)
    replayed = [round(s.replay * s.tokens / B, 1) for s in found.stages if s.replay_of == "pretrain-2b"]
    assert replayed == [81.1, 10.6]


RAMPED = TrainConfig.parse(
    {
        "context": 8, "batch_rows": 4, "micro_rows": 1, "steps": 20,
        "batch_ramp": [{"rows": 1, "until_tokens": 20}, {"rows": 2, "until_tokens": 60}],
    }
)  # fmt: skip


def test_a_batch_ramp_counts_every_token() -> None:
    rows = [RAMPED.rows_at(step) for step in range(20)]
    assert rows[:7] == [1, 1, 1, 2, 2, 2, 4]  # 24 tokens, then 24 + 3 * 16 = 72, the first counts at or past the ends
    assert [RAMPED.tokens_until(step) for step in range(21)] == [8 * sum(rows[:step]) for step in range(21)]


@given(st.integers(1, 2000))
def test_steps_for_tokens_is_the_least_that_suffices(tokens: int) -> None:
    steps = RAMPED.steps_for(tokens)
    assert RAMPED.tokens_until(steps) >= tokens > RAMPED.tokens_until(steps - 1)


def test_replay_mixes_the_earlier_stage_in() -> None:
    found = recipe(
        stage("first", mixture={"web": 3, "code": 1}),
        stage("second", mixture={"long": 2, "code": 2}, replay=0.2, replay_of="first"),
    )
    weights = found.weights(found.stages[1])
    assert weights == pytest.approx({"long": 0.4, "code": 0.4 + 0.05, "web": 0.15})
    assert found.tokens_before(found.stages[1]) == 10_000


def test_a_stage_lays_its_knobs_over_the_common_ones() -> None:
    found = recipe(
        stage(train={"lr": 0.5, "optim": {"steps": 3}}), seed=7, train={"context": 16, "optim": {"kind": "muon"}}
    )
    config = found.training(found.stages[0])
    assert (config.lr, config.context, config.seed, config.optim.steps) == (0.5, 16, 7, 3)  # type: ignore[union-attr]
    assert config.steps == math.ceil(10_000 / (16 * 16))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage(), stage()], "two stages are called 'one'"),
        ([stage(mixture={})], "needs either a mixture or conversations"),
        ([stage(conversations="c.jsonl")], "needs either a mixture or conversations"),
        ([stage(replay=0.2)], "replay and replay_of go together"),
        ([stage(replay=0.2, replay_of="none")], "replay_of='none' is no earlier stage"),
        ([stage(mixture={"web": 0.0})], "weights must be above 0"),
        ([stage(mixture={"web": math.inf})], "weights must be above 0"),
        ([stage(train={"steps": 3})], "train.steps follows from tokens=10000"),
        ([stage(train={"seed": 3})], "train.seed is the recipe's seed=0"),
        ([stage(train={"lr": 1e-3, "final_lr": 2e-3})], "final_lr=0.002 is above lr=0.001"),
        ([stage(train={"mtp_joint_from": -1})], "mtp_joint_from=-1"),
        ([stage(train={"optim": {"adamw_betas": [1.5, 0.9]}})], "adamw_betas"),
        ([stage(), stage("two", train={"optim": {"kind": "adamw"}})], "optim.kind must be one in all stages"),
        ([{"name": "sft", "tokens": 9, "conversations": "c", "mask_meta_from_tokens": 0}], "no meta tokens"),
        ([stage(train={"lrr": 3})], "unknown key 'lrr'"),
        ([stage(train={"lr": -1})], "lr=-1"),
        ([stage(tokens=0)], "tokens"),
        ([stage("Bad Name")], "name"),
    ],
)
def test_contradictions_are_refused(stages: list[dict[str, Any]], message: str) -> None:
    assert message in refusal(*stages)


def test_theta_changes_by_kind_of_layer() -> None:
    config = with_theta(preset("tiny"), full=1e6, sliding=None)
    thetas = {layer.window is None: layer.rope_theta for layer in config.layers()}
    assert thetas == {True: 1e6, False: 10_000.0}
    assert with_theta(config, None, 2e4).layer(1).rope_theta == 2e4
