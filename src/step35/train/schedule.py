"""Learning rates: linear warm-up, then a cosine to the final rate (section 4.2)."""

from __future__ import annotations

import math

from step35.config.train import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of update number `step` (0-based)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_lr + (config.lr - config.final_lr) * cosine
