"""`docs/stability.md` and the code cannot part, and every logged figure is described there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from step35.config.layouts import s3f1
from step35.config.stability import StabilityConfig
from step35.config.train import TrainConfig
from step35.data.packing import Batch
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.train.monitors.alarms import RULES
from step35.train.monitors.catalog import GROUPS, describes, written
from step35.train.step import Learner

PAGE = Path(__file__).parents[2] / "docs" / "stability.md"
TRAINERS = {"loss", "mtp_loss", "balance_loss", "lr", "moe_layers"}
"""Keys that are no figure of health."""


def test_the_page_is_as_generated() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "run: python -m step35.train.monitors.catalog docs/stability.md"
    for rule in RULES:
        assert f"| `{rule.name}` |" in page


def test_every_logged_key_is_described_and_every_description_is_logged(
    make_model: Callable[..., Step35], make_batch: Callable[..., Batch]
) -> None:
    config = TrainConfig(
        batch_rows=4, micro_rows=2, context=24, dtype="float32", stability=StabilityConfig(per_micro_batch=True)
    )
    learner = Learner(make_model(), config)
    logged = learner.update(make_batch(), 0) | learner.details()
    assert [key for key in logged if key not in TRAINERS and not describes(key)] == []
    stems = [re.split("CLASS|LAYER|KEY", m.key)[0] for _, measures in GROUPS for m in measures]
    assert [stem for stem in stems if not any(key.startswith(stem) for key in logged)] == []
    for rule in RULES:
        assert rule.metric in logged


def test_figures_of_micro_batches_are_lists_of_each(
    make_model: Callable[..., Step35], make_batch: Callable[..., Batch]
) -> None:
    config = TrainConfig(
        batch_rows=4, micro_rows=2, context=24, dtype="float32", stability=StabilityConfig(per_micro_batch=True)
    )
    found = Learner(make_model(), config).update(make_batch(), 0)
    assert sum(found["micro.loss"]) == found["loss"]
    assert len(found["micro.load_cv"]) == len(found["micro.expert_output_max_ratio"]) == 2
    assert max(found["micro.attention_logit_max"]) == found["attention_logit_max"]


def test_a_model_without_experts_is_watched_as_well(make_batch: Callable[..., Batch]) -> None:
    config = s3f1(
        layers=2, dense=2, mtp=0, heads=2, sliding_heads=4, groups=2, head_dim=16, vocab_size=97, hidden_size=32,
        intermediate_size=48, sliding_window=8,
    )  # fmt: skip
    model = Step35(config)
    initialise(model, torch.Generator().manual_seed(0))
    learner = Learner(model, TrainConfig(batch_rows=4, micro_rows=4, context=24, dtype="float32", ep_weight=0.0))
    found = learner.update(make_batch(), 0) | learner.details()
    assert found["attention_logit_max"] > 0
    assert "expert_load" not in found
