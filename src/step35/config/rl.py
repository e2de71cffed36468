"""Knobs of reinforcement learning with MIS-PO (report section 6)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from step35.config.base import Config, Trackers
from step35.config.checkpoint import CheckpointConfig


class MISPOConfig(Config):
    """Bounds of the two 0/1 filters on pi_old / pi_infer (eq. 2)."""

    token_low: float = Field(default=0.5, gt=0)
    token_high: float = 2.0
    trajectory_low: float = Field(default=0.996, gt=0)
    """Lower bound on the geometric mean over a response; see `trajectory_high`."""
    trajectory_high: float = 1.001
    """Almost nothing legitimate lies above 1: under the sampler the mean log-ratio is -KL."""
    ratio_at: Literal["snapshot", "update"] = "snapshot"
    """Take pi_old once before the mini-batches, or afresh at each of them, against the policy that sampled."""


class RLConfig(Config):
    """One RL stage: `steps` rounds of rollouts, each followed by one epoch over them."""

    steps: int = Field(default=20, ge=1)
    """Rounds."""
    prompts: int = Field(default=48, ge=1)
    """Fresh problems a round."""
    responses: int = Field(default=2, ge=1)
    """Rollouts of each problem."""
    max_turns: int = Field(default=3, ge=1)
    """Assistant turns an episode may take."""
    max_turn_tokens: int = Field(default=64, ge=1)
    """Tokens an assistant turn may take; beyond, the episode counts as truncated."""
    actor_batches: int = Field(default=4, ge=1)
    """Mini-batches of the actor's epoch (4 in the report)."""
    critic_batches: int = Field(default=12, ge=1)
    """Mini-batches of the critic's epoch (12 in the report)."""
    actor_lr: float = Field(default=5e-4, gt=0)
    """Peak rate of the policy."""
    critic_lr: float = Field(default=1e-3, gt=0)
    """Peak rate of the value model."""
    mtp_lr: float = Field(default=2e-3, ge=0)
    """Peak rate of the MTP modules, which learn to draft what the policy said in the round, without a gradient to
    the trunk; 0 leaves them behind the policy."""
    mtp_decay: float = Field(default=0.6, gt=0, le=1)
    """The loss of depth k weighs in proportion to mtp_decay^k."""
    mtp_batches: int = Field(default=2, ge=1)
    """Mini-batches, of the actor's size, that the MTP modules see of a round: they need fewer than it has."""
    actor_warmup: int = Field(default=4, ge=0)
    """Actor updates over which its rate rises from 0."""
    critic_warmup: int = Field(default=12, ge=0)
    """Critic updates over which its rate rises from 0."""
    final_lr_share: float = Field(default=0.2, ge=0, le=1)
    """Both rates fall linearly over the rounds to this share of their peak."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices, times the rate."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of a gradient; longer ones are scaled down."""
    negative_weight: float = Field(default=1.0, ge=0, le=1)
    """Factor on negative advantages. 1 is the report's; below, a small batch's failures, which say what not to do
    without saying what to do, disturb a small policy less."""
    mis_po: MISPOConfig = MISPOConfig()
    checkpoint_every: int = Field(default=4, ge=1)
    """Rounds between checkpoints."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    track: Trackers = ()
    """Trackers that get the metrics too; may change when a run is resumed."""
    seed: int = Field(default=0, ge=0)
    """Seed of problems, samples and mini-batches."""
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"
    """Compute dtype of the updates. float32 keeps training and inference log-probabilities equal, which the narrow
    trajectory band needs on responses this short."""
