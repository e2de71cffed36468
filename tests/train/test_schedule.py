from __future__ import annotations

import math

import pytest

from step35.config.train import TrainConfig
from step35.train.schedule import balance_rate, learning_rate

CONFIG = TrainConfig(steps=50, warmup_steps=10, lr=1.0, final_lr=0.2)


def test_the_rate_rises_linearly_to_its_peak() -> None:
    assert [learning_rate(CONFIG, step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_then_it_falls_as_a_cosine_to_the_final_rate() -> None:
    for step in range(10, 50):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 10) / 40)) / 2
        assert learning_rate(CONFIG, step) == pytest.approx(expected)
    assert learning_rate(CONFIG, 10) == pytest.approx(1.0)
    assert learning_rate(CONFIG, 30) == pytest.approx(0.6)


def test_it_stays_final_after_the_end() -> None:
    assert learning_rate(CONFIG, 50) == pytest.approx(0.2)
    assert learning_rate(CONFIG, 70) == pytest.approx(0.2)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(TrainConfig(steps=5, warmup_steps=0, lr=1.0), 0) == pytest.approx(1.0)


def test_a_run_may_be_all_warm_up() -> None:
    assert learning_rate(TrainConfig(steps=5, warmup_steps=5, lr=1.0), 4) == pytest.approx(1.0)


def test_other_decays() -> None:
    linear = CONFIG.model_copy(update={"decay": "linear"})
    assert [learning_rate(linear, step) for step in (10, 30, 50)] == pytest.approx([1.0, 0.6, 0.2])
    constant = CONFIG.model_copy(update={"decay": "constant"})
    assert [learning_rate(constant, step) for step in (0, 10, 49)] == pytest.approx([0.1, 1.0, 1.0])


def test_the_balance_rate_falls_linearly_to_its_end() -> None:
    assert balance_rate(CONFIG, 49) == CONFIG.balance_rate == 1e-3
    falling = CONFIG.model_copy(update={"final_balance_rate": 0.0})
    assert [balance_rate(falling, step) for step in (0, 49)] == [1e-3, 0.0]
    assert balance_rate(falling, 7) == pytest.approx(1e-3 * 42 / 49)


def test_without_a_final_rate_it_falls_to_a_tenth() -> None:
    config = TrainConfig(steps=50, lr=3e-4)
    assert learning_rate(config, 50) == pytest.approx(3e-5)
    assert learning_rate(config, 49) > 3e-5
