"""Stability: what raises each alarm and what it does. What they mean stands in `docs/stability.md` (section 4.1)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from step35.config.base import Config

Action = Literal["off", "warn", "skip", "rollback", "stop"]


class AlarmConfig(Config):
    """One alarm."""

    limit: float = Field(ge=0)
    """The measure's value past which the alarm holds."""
    patience: int = Field(default=1, ge=1)
    """Steps in a row that the value must be past the limit."""
    action: Action = "warn"
    """off, warn (an event and a line), skip (the batch), rollback (to the last checkpoint, on past the data), stop."""


class NonFiniteAlarmConfig(AlarmConfig):
    """The alarm about what is not a number: such an update is never made, so it cannot be a mere warning."""

    limit: float = Field(default=0, ge=0, le=0)
    """Always 0."""
    patience: int = Field(default=1, ge=1, le=1)
    """Always 1."""
    action: Literal["skip", "rollback", "stop"] = "stop"
    """skip (the batch), rollback (to the last checkpoint, on past the data), stop."""


class LateAlarmConfig(AlarmConfig):
    """An alarm about the update itself: the batch can no longer be skipped."""

    action: Literal["off", "warn", "rollback", "stop"] = "warn"
    """off, warn (an event and a line), rollback (to the last checkpoint, on past the data), stop."""


class DataAlarmConfig(Config):
    """An alarm about data that cannot be read."""

    action: Literal["skip", "stop"] = "stop"
    """skip leaves out the rows that cannot be read; stop ends the run."""


class StabilityConfig(Config):
    """Monitors, alarms and what follows from them."""

    monitors: bool = True
    """Watch experts, attention and updates; off leaves losses, norms, non_finite, loss_spike and gradient_spike."""
    per_micro_batch: bool = False
    """Also log loss and expert figures of every micro-batch, as lists named micro.*."""
    window: int = Field(default=100, ge=2)
    """Steps of the running means that spikes are held against."""
    max_skips: int = Field(default=5, ge=1)
    """Batches skipped in a row, or as many rows that cannot be read within one step, after which the run stops."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Rollbacks of a run, after which it stops."""
    non_finite: NonFiniteAlarmConfig = NonFiniteAlarmConfig()
    bad_data: DataAlarmConfig = DataAlarmConfig()
    loss_spike: AlarmConfig = AlarmConfig(limit=8)
    gradient_spike: AlarmConfig = AlarmConfig(limit=10)
    expert_blow_up: AlarmConfig = AlarmConfig(limit=8, patience=3)
    expert_collapse: AlarmConfig = AlarmConfig(limit=0.1, patience=20)
    dead_experts: AlarmConfig = AlarmConfig(limit=0.1, patience=20)
    load_imbalance: AlarmConfig = AlarmConfig(limit=0.75, patience=50)
    attention_logits: AlarmConfig = AlarmConfig(limit=100, patience=3)
    bias_drift: AlarmConfig = AlarmConfig(limit=1)
    muon_outlier: LateAlarmConfig = LateAlarmConfig(limit=1.2)
    update_rms: LateAlarmConfig = LateAlarmConfig(limit=2)

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:
        """Let a table say only what differs: `expert_blow_up = {action = "rollback"}`."""
        if not isinstance(values, dict):
            return values
        complete = dict(values)
        for name, value in values.items():
            if isinstance(value, dict) and name in cls.model_fields:
                complete[name] = {**cls.model_fields[name].default.model_dump(), **value}
        return complete

    @property
    def rolls_back(self) -> bool:
        """Return whether any alarm may roll back, for which a run needs a checkpoint from its start.

        non_finite with skip does when an update has left parameters that are not finite.
        """
        actions = [getattr(getattr(self, name), "action", "") for name in type(self).model_fields]
        return "rollback" in actions or self.non_finite.action == "skip"
