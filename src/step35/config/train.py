"""Knobs of training: optimiser, schedule, losses, and what is logged and saved when."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from step35.config.base import Config, Trackers
from step35.config.checkpoint import CheckpointConfig
from step35.config.stability import StabilityConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class MuonConfig(Config):
    """Muon with Polar Express for hidden matrices, AdamW for the rest (sections 3 and 4.1)."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    steps: int = Field(default=6, ge=1)
    """Polar Express iterations."""
    smallest: float = Field(default=1e-3, gt=0, lt=1)
    """Singular values down to this share of a matrix's norm are brought to 1; the polynomials follow from it."""
    iteration_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Rounding of the iteration's state: the report found bf16 to produce rare extreme outliers."""
    adamw_betas: tuple[Beta, Beta] = (0.9, 0.95)


class AdamWConfig(Config):
    """AdamW for everything: the baseline."""

    kind: Literal["adamw"] = "adamw"
    adamw_betas: tuple[Beta, Beta] = (0.9, 0.95)


class RampConfig(Config):
    """A smaller batch for the first tokens of a stage."""

    rows: int = Field(ge=1)
    """Rows of an update."""
    until_tokens: int = Field(ge=1)
    """Tokens of this stage after which the batch grows."""


class TrainConfig(Config):
    """One training stage: `steps` updates on batches of `batch_rows` x `context` tokens."""

    steps: int = Field(default=400, ge=1)
    """Updates to train for."""
    batch_rows: int = Field(default=16, ge=1)
    """Rows of one update."""
    micro_rows: int = Field(default=16, ge=1)
    """Rows of one forward and backward pass, at most; a larger batch is split into passes of this size."""
    batch_ramp: tuple[RampConfig, ...] = ()
    """Smaller batches at the start, in order of `until_tokens` (section 4.2)."""
    context: int = Field(default=256, ge=8)
    """Tokens of a row."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation and data order."""
    optim: Annotated[MuonConfig | AdamWConfig, Field(discriminator="kind")] = MuonConfig()
    lr: float = Field(default=5e-3, gt=0)
    """Peak learning rate; Muon's update is scaled so that one rate serves both optimisers."""
    final_lr: float | None = Field(default=None, ge=0)
    """Rate at the end, at most `lr`; None is a tenth of `lr`."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate goes from its peak to `final_lr`; constant stays at the peak."""
    warmup_steps: int = Field(default=20, ge=0)
    """Updates over which the rate rises to its peak."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices, times the rate; vectors do not decay."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; longer ones are scaled down."""
    mtp_weight: float = Field(default=0.3, ge=0)
    """Weight of the MTP losses together; depth k gets a share proportional to mtp_decay^k."""
    mtp_decay: float = Field(default=0.6, gt=0, le=1)
    mtp_joint_from: int | None = Field(default=None, ge=0)
    """Step at which MTP-2 and later are cloned from MTP-1 and join; None trains MTP-1 only."""
    balance_rate: float = Field(default=1e-3, ge=0)
    """Step of the loss-free router bias; 0 freezes it."""
    final_balance_rate: float | None = Field(default=None, ge=0)
    """Balance rate at the end, reached linearly; None stays at `balance_rate`."""
    ep_groups: int = Field(default=4, ge=1)
    """Expert groups of the balance loss, one per expert-parallel rank."""
    ep_weight: float = Field(default=1e-3, ge=0)
    """Weight of the EP-group balance loss (eq. 1)."""
    freeze_router: bool = False
    """Keep router weights as they are (mid-training and SFT in the report)."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype; auto is bf16 where the device multiplies it natively."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights; bfloat16 keeps fp32 masters beside them, so that small updates are not lost."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Updates between checkpoints."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    validate_every: int = Field(default=100, ge=1)
    """Updates between measurements of the validation loss."""
    monitor_every: int = Field(default=20, ge=1)
    """Updates between records of every expert's load, activation and norm."""
    track: Trackers = ()
    """Trackers that get the metrics too; may change when a run is resumed."""

    stability: StabilityConfig = StabilityConfig()
    """Monitors, alarms and their actions."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.batch_rows > self.micro_rows and self.batch_rows % self.micro_rows:
            divisors = [n for n in range(1, self.batch_rows + 1) if self.batch_rows % n == 0]
            raise ValueError(
                f"batch_rows={self.batch_rows} is not divisible by micro_rows={self.micro_rows}; choose from {divisors}"
            )
        if self.final_lr is not None and self.final_lr > self.lr and self.decay != "constant":
            raise ValueError(
                f"final_lr={self.final_lr:g} is above lr={self.lr:g}, and the rate is to fall; give at most lr, or "
                "leave it out for a tenth of lr"
            )
        ends = [ramp.until_tokens for ramp in self.batch_ramp]
        if ends != sorted(set(ends)):
            raise ValueError(f"batch_ramp: until_tokens must rise from entry to entry, not {ends}")
        for ramp in self.batch_ramp:
            if ramp.rows > self.micro_rows and ramp.rows % self.micro_rows:
                raise ValueError(f"batch_ramp: rows={ramp.rows} is not divisible by micro_rows={self.micro_rows}")
        return self

    @property
    def last_lr(self) -> float:
        """Rate at the end."""
        return self.lr / 10 if self.final_lr is None else self.final_lr

    @property
    def phases(self) -> list[tuple[int, int]]:
        """Return (first step, rows of an update) of each part of the batch ramp; the last part has no end."""
        found, step, tokens = [], 0, 0
        for ramp in self.batch_ramp:
            found.append((step, ramp.rows))
            more = max(0, math.ceil((ramp.until_tokens - tokens) / (ramp.rows * self.context)))
            step, tokens = step + more, tokens + more * ramp.rows * self.context
        return [*found, (step, self.batch_rows)]

    def rows_at(self, step: int) -> int:
        """Return the rows of update `step` (0-based)."""
        return next(rows for first, rows in reversed(self.phases) if first <= step)

    def rows_until(self, step: int) -> int:
        """Return the rows of the updates before `step`."""
        phases = self.phases
        ends = [first for first, _ in phases[1:]] + [max(step, phases[-1][0])]
        return sum(
            rows * (min(step, end) - first) for (first, rows), end in zip(phases, ends, strict=True) if first < step
        )

    def tokens_until(self, step: int) -> int:
        """Return the tokens of the updates before `step`."""
        return self.context * self.rows_until(step)

    def steps_for(self, tokens: int) -> int:
        """Return the least number of updates that see `tokens` tokens (at least 1)."""
        # The phase in which they are reached is the last one that begins with fewer tokens seen.
        first, rows = next(phase for phase in reversed(self.phases) if self.tokens_until(phase[0]) < tokens)
        return first + math.ceil((tokens - self.tokens_until(first)) / (rows * self.context))
