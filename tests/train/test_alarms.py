"""The rules: limits, patience and one alarm for one cause; the running figures they are held against."""

from __future__ import annotations

import math
from typing import Any

import pytest

from step35.config.stability import AlarmConfig, StabilityConfig
from step35.config.train import TrainConfig
from step35.errors import ConfigError
from step35.train.monitors.alarms import RULES, Alarm, Alarms, severest
from step35.train.monitors.running import Running


def told(alarms: Alarms, metric: str, values: list[float]) -> list[int]:
    """Return at which of the values an alarm is new."""
    steps = []
    for step, value in enumerate(values):
        for late in (False, True):
            if alarms.judge({metric: value}, {}, step, after_update=late)[1]:
                steps.append(step)
    return steps


def test_one_cause_is_one_alarm_until_the_value_is_well_inside() -> None:
    alarms = Alarms(StabilityConfig(attention_logits=AlarmConfig(limit=100)))
    values = [50, 101, 120, 99, 101, 95, 130, 79, 101, 102]
    assert told(alarms, "attention_logit_max", values) == [1, 8]  # 99 and 95 are not over: 80 is


def test_an_alarm_holds_as_long_as_the_value_is_beyond() -> None:
    alarms = Alarms(StabilityConfig(loss_spike=AlarmConfig(limit=5, action="skip")))
    held = [alarms.judge({"loss_z": z}, {}, 0, after_update=False) for z in (6, 7, 4.9)]
    assert [(len(holding), len(new)) for holding, new in held] == [(1, 1), (1, 0), (0, 0)]


def test_patience_counts_steps_in_a_row() -> None:
    alarms = Alarms(StabilityConfig(dead_experts=AlarmConfig(limit=0.1, patience=3)))
    assert told(alarms, "dead_share", [0.2, 0.2, 0.0, 0.2, 0.2, 0.2, 0.2]) == [5]


def test_slow_growth_and_slow_decay_are_found_at_the_limit() -> None:
    config = StabilityConfig(expert_blow_up=AlarmConfig(limit=8), expert_collapse=AlarmConfig(limit=0.1))
    assert told(Alarms(config), "expert_output_max_ratio", [1.001**i for i in range(3000)]) == [2081]
    assert told(Alarms(config), "expert_rms_min_ratio", [0.999**i for i in range(3000)]) == [2302]
    assert told(Alarms(config), "expert_rms_min_ratio", [1.0, 0.5, 0.9]) == []


def test_off_is_silent_and_an_unknown_value_changes_nothing() -> None:
    alarms = Alarms(StabilityConfig(bias_drift=AlarmConfig(limit=1, action="off")))
    assert told(alarms, "bias_spread", [2.0, 3.0]) == []
    assert told(alarms, "attention_logit_max", [math.nan, math.nan]) == []


def test_the_severest_action_counts() -> None:
    def alarm(action: str) -> Alarm:
        return Alarm(action, 0, 0, 0, "", "", "", action)

    assert severest([alarm("warn")]) is None
    found = severest([alarm("skip"), alarm("rollback"), alarm("warn")])
    assert found is not None
    assert found.action == "rollback"


def test_the_memory_is_saved() -> None:
    first, second = Alarms(StabilityConfig()), Alarms(StabilityConfig())
    told(first, "expert_output_max_ratio", [1.0, 9.0, 10.0])  # one step short of the default patience
    second.load_state_dict(first.state_dict())
    assert told(first, "expert_output_max_ratio", [11.0]) == told(second, "expert_output_max_ratio", [11.0]) == [0]


def test_every_rule_has_a_setting_and_words() -> None:
    for rule in RULES:
        assert isinstance(getattr(StabilityConfig(), rule.name), AlarmConfig)
        assert rule.cause.endswith(".")
        assert rule.remedy.endswith(".")


def test_a_table_says_only_what_differs_and_nonsense_is_refused() -> None:
    def parsed(values: dict[str, Any]) -> StabilityConfig:
        return TrainConfig.parse({"stability": values}).stability

    assert parsed({"expert_blow_up": {"action": "rollback"}}).expert_blow_up == AlarmConfig(
        limit=8, patience=3, action="rollback"
    )
    assert parsed({"expert_blow_up": {"action": "rollback"}}).rolls_back
    assert not StabilityConfig().rolls_back
    with pytest.raises(ConfigError, match=r"update_rms\.action='skip'"):
        parsed({"update_rms": {"action": "skip"}})
    with pytest.raises(ConfigError, match="Did you mean 'expert_blow_up'"):
        parsed({"expert_blowup": {"limit": 2}})
    for nonsense in ({"action": "warn"}, {"action": "off"}, {"patience": 2}, {"limit": 5}):
        with pytest.raises(ConfigError, match="non_finite"):
            parsed({"non_finite": nonsense})
    assert parsed({"non_finite": {"action": "skip"}}).rolls_back


def test_a_z_score_is_held_against_the_values_before() -> None:
    running = Running(window=1000)
    values = [2.0 + 0.1 * (-1) ** i for i in range(200)]
    for value in values:
        running.add(value)
    assert running.mean == pytest.approx(2.0, abs=1e-3)
    assert running.z_score(3.0) == pytest.approx(10, rel=0.02)
    assert running.ratio(6.0) == pytest.approx(3.0, rel=1e-3)


def test_few_values_and_no_numbers_make_no_spike_and_one_spike_does_not_hide_the_next() -> None:
    running = Running(window=50)
    for _ in range(19):
        running.add(1.0)
        assert running.z_score(100.0) == 0.0
        assert running.ratio(100.0) == 1.0
    for i in range(100):
        running.add(1.0 + 0.05 * (-1) ** i)
    running.add(math.nan)
    first = running.z_score(9.0)
    running.add(9.0)
    assert running.z_score(9.0) > 0.7 * first > 50
    assert running.z_score(math.nan) == 0.0


def test_the_running_mean_follows_a_new_level() -> None:
    running = Running(window=20)
    for value in [1.0] * 100 + [2.0] * 200:
        running.add(value)
    assert running.mean == pytest.approx(2.0, rel=0.01)
    assert running.z_score(2.0) == pytest.approx(0.0, abs=1)
