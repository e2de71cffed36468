"""Knobs of saving: which checkpoints stay, where the writing happens, and what a full disk does.

None of them changes what is computed, so a run may be taken up again with other ones.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from step35.config.base import Config


class CheckpointConfig(Config):
    """How a run keeps its checkpoints."""

    keep: int = Field(default=2, ge=1)
    """Newest checkpoints to keep; with 1 there is none to fall back to when it is damaged."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep for ever what is saved at a multiple of so many steps; None keeps only the newest."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """Stop when a checkpoint finds no space, or warn and go on without it."""
    background: bool = True
    """Write while training goes on. It takes the memory of one more state; without, training waits for the disk."""
