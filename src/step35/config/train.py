"""Knobs of training: optimiser, schedule, losses, and what is logged and saved when."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from step35.config.base import Config


class MuonConfig(Config):
    """Muon with Polar Express for hidden matrices, AdamW for the rest (sections 3 and 4.1)."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    steps: int = Field(default=6, ge=1, le=8)
    """Polar Express iterations."""
    iteration_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Rounding of the iteration's state: the report found bf16 to produce rare extreme outliers."""
    adamw_betas: tuple[float, float] = (0.9, 0.95)


class AdamWConfig(Config):
    """AdamW for everything: the baseline."""

    kind: Literal["adamw"] = "adamw"
    adamw_betas: tuple[float, float] = (0.9, 0.95)


class TrainConfig(Config):
    """One training stage: `steps` updates on batches of `batch_rows` x `context` tokens."""

    steps: int = Field(default=400, ge=1)
    """Updates to train for."""
    batch_rows: int = Field(default=16, ge=1)
    """Rows of one update."""
    micro_rows: int = Field(default=16, ge=1)
    """Rows of one forward and backward pass; a batch is split into passes of this size."""
    context: int = Field(default=256, ge=8)
    """Tokens of a row."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation and data order."""
    optim: Annotated[MuonConfig | AdamWConfig, Field(discriminator="kind")] = MuonConfig()
    lr: float = Field(default=5e-3, gt=0)
    """Peak learning rate; Muon's update is scaled so that one rate serves both optimisers."""
    final_lr: float = Field(default=5e-4, ge=0)
    """Rate at the end of the cosine."""
    warmup_steps: int = Field(default=20, ge=0)
    """Updates over which the rate rises to its peak."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices, times the rate; vectors do not decay."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; longer ones are scaled down."""
    mtp_weight: float = Field(default=0.3, ge=0)
    """Weight of the MTP losses together; depth k gets a share proportional to mtp_decay^k."""
    mtp_decay: float = Field(default=0.6, gt=0, le=1)
    mtp_joint_from: int | None = None
    """Step at which MTP-2 and later are cloned from MTP-1 and join; None trains MTP-1 only."""
    balance_rate: float = Field(default=1e-3, ge=0)
    """Step of the loss-free router bias; 0 freezes it."""
    ep_groups: int = Field(default=4, ge=1)
    """Expert groups of the balance loss, one per expert-parallel rank."""
    ep_weight: float = Field(default=1e-3, ge=0)
    """Weight of the EP-group balance loss (eq. 1)."""
    freeze_router: bool = False
    """Keep router weights as they are (mid-training and SFT in the report)."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype; auto is bf16 where the device multiplies it natively."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Updates between checkpoints."""
    validate_every: int = Field(default=100, ge=1)
    """Updates between measurements of the validation loss."""
    monitor_every: int = Field(default=20, ge=1)
    """Updates between records of every expert's load, activation and norm."""

    @model_validator(mode="after")
    def _splits_evenly(self) -> TrainConfig:
        if self.batch_rows % self.micro_rows:
            divisors = [n for n in range(1, self.batch_rows + 1) if self.batch_rows % n == 0]
            raise ValueError(
                f"batch_rows={self.batch_rows} is not divisible by micro_rows={self.micro_rows}; choose from {divisors}"
            )
        return self

    @property
    def batch_tokens(self) -> int:
        """Tokens of one update."""
        return self.batch_rows * self.context
