"""Knobs of supervised fine-tuning and evaluation."""

from __future__ import annotations

from pydantic import Field

from step35.config.base import Config
from step35.config.train import TrainConfig


class SFTConfig(TrainConfig):
    """Supervised fine-tuning: the trainer's knobs, and how many demonstrations to synthesise."""

    conversations: int = Field(default=4000, ge=1)
    """Demonstrations to synthesise and execute."""
    mistakes: float = Field(default=0.05, ge=0, le=1)
    """Share of demonstrations that show a failing call and its correction."""
    follow_ups: float = Field(default=0.25, ge=0, le=1)
    """Share of demonstrations that come after another question and its answer."""
    phrasings: int = Field(default=4, ge=1, le=4)
    """Ways of putting a problem that the demonstrations cover; the others are left for RL to meet."""


class EvalConfig(Config):
    """Held-out evaluation."""

    problems: int = Field(default=200, ge=1)
    """Held-out problems; greedy and sampled pass@1 use the same ones."""
    samples: int = Field(default=2, ge=1)
    """Samples of each problem for sampled pass@1."""
    speed_prompts: int = Field(default=16, ge=1)
    """Held-out prompts decoded one at a time, plain and speculative."""
    max_turns: int = Field(default=3, ge=1)
    """Assistant turns a problem may take."""
    max_turn_tokens: int = Field(default=64, ge=1)
    """Tokens an assistant turn may take."""
    seed: int = Field(default=0, ge=0)
    """Seed of the problems and samples."""
