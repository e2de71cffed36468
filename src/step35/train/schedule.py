"""Rates over the steps of a stage: learning rate with linear warm-up and decay, balance rate (section 4.2)."""

from __future__ import annotations

import math

from step35.config.train import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of update number `step` (0-based)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, progress))),
        "linear": 1.0 - min(1.0, progress),
        "constant": 1.0,
    }[config.decay]
    return config.last_lr + (config.lr - config.last_lr) * left


def balance_rate(config: TrainConfig, step: int) -> float:
    """Return the step of the loss-free router bias at update number `step` (0-based)."""
    if config.final_balance_rate is None:
        return config.balance_rate
    progress = min(1.0, step / max(1, config.steps - 1))
    return config.balance_rate + (config.final_balance_rate - config.balance_rate) * progress
