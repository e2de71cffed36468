"""A recipe: the stages of a training run in one TOML file, as section 4.2 of the report tells its own.

Each stage is a table of what changes (tokens, data, angles) and a `train` table of the trainer's knobs, laid over the
recipe's common `train` table. Stages run one after the other, each from the weights, optimiser state and data order
of the one before.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from step35.config.base import Config
from step35.config.data import PrepareConfig
from step35.config.load import lay_over
from step35.config.model import ModelConfig
from step35.config.train import TrainConfig


class ProbeConfig(Config):
    """A needle-retrieval probe: facts far back that the model must find, before the stage and after it."""

    contexts: tuple[int, ...] = Field(min_length=1)
    """Tokens of the prompts, one entry for each length to try."""
    prompts: int = Field(default=64, ge=1)
    """Prompts; the depth of the needle runs evenly over the context."""


class StageConfig(Config):
    """One stage of a recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """Name of the stage and of its folder."""
    tokens: int = Field(ge=1)
    """Tokens to train on; the steps follow from it."""
    mixture: dict[str, float] = Field(default={})
    """Weight of each data source; weights are relative."""
    replay: float = Field(default=0.0, ge=0, lt=1)
    """Share of the tokens that come from the mixture of `replay_of`."""
    replay_of: str | None = None
    """Earlier stage whose mixture is replayed."""
    conversations: str | None = None
    """JSON lines of conversations to fine-tune on, instead of a mixture."""
    warmup_share: float | None = Field(default=None, ge=0, le=1)
    """Warm-up as a share of the stage's steps, instead of `train.warmup_steps`."""
    theta_full: float | None = Field(default=None, gt=0)
    """RoPE base of full-attention layers from this stage on."""
    theta_sliding: float | None = Field(default=None, gt=0)
    """RoPE base of sliding-window layers from this stage on."""
    mask_meta_from_tokens: int | None = Field(default=None, ge=0)
    """Tokens of the whole recipe after which meta tokens stay in context but leave the loss (app. A.3)."""
    probe: ProbeConfig | None = None
    """A needle-retrieval probe before and after the stage."""
    train: dict[str, Any] = Field(default={})
    """The trainer's knobs that differ from the recipe's `train` table."""


class RecipeConfig(Config):
    """A whole training run."""

    preset: str
    """Model preset."""
    mtp: int | None = Field(default=None, ge=0)
    """MTP modules of the model, instead of the preset's."""
    seed: int = Field(default=0, ge=0)
    """Seed of every stage."""
    prepare: PrepareConfig = PrepareConfig()
    """Tokenizer and data sources."""
    train: dict[str, Any] = Field(default={})
    """The trainer's knobs that all stages share."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """What to train, in order."""

    @model_validator(mode="after")
    def _consistent(self) -> RecipeConfig:
        seen: dict[str, StageConfig] = {}
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called {stage.name!r}; give each a name of its own")
            if bool(stage.mixture) == bool(stage.conversations):
                raise ValueError(f"stage {stage.name!r} needs either a mixture or conversations")
            if (stage.replay > 0) != (stage.replay_of is not None):
                raise ValueError(f"stage {stage.name!r}: replay and replay_of go together")
            if stage.replay_of is not None and not (stage.replay_of in seen and seen[stage.replay_of].mixture):
                raise ValueError(
                    f"stage {stage.name!r}: replay_of={stage.replay_of!r} is no earlier stage with a mixture; "
                    f"choose from {[name for name, earlier in seen.items() if earlier.mixture]}"
                )
            bad = {key: weight for key, weight in stage.mixture.items() if not 0 < weight < math.inf}
            if bad:
                raise ValueError(f"stage {stage.name!r}: weights must be above 0, not {bad}; leave the source out")
            if stage.conversations and (stage.replay or stage.mask_meta_from_tokens is not None):
                raise ValueError(
                    f"stage {stage.name!r}: conversations have no replay and no meta tokens; leave out replay, "
                    "replay_of and mask_meta_from_tokens"
                )
            given = stage.train.keys() | self.train.keys()
            if "steps" in given:
                raise ValueError(f"stage {stage.name!r}: train.steps follows from tokens={stage.tokens}; leave it out")
            if "seed" in given:
                raise ValueError(f"stage {stage.name!r}: train.seed is the recipe's seed={self.seed}; set that one")
            seen[stage.name] = stage
        # A bad knob of the last stage is to be said before the first one starts.
        kinds = {stage.name: self.training(stage).optim.kind for stage in self.stages}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"optim.kind must be one in all stages, which hand on their moments, not {kinds}")
        return self

    def training(self, stage: StageConfig) -> TrainConfig:
        """Return the trainer's settings of `stage`; its last step may go past `tokens` by less than a batch."""
        values = lay_over(self.train, stage.train) | {"seed": self.seed}
        one = TrainConfig.parse(values | {"steps": 1}, where=f"stage {stage.name!r}")  # for its batches alone
        steps = one.steps_for(stage.tokens)
        if stage.warmup_share is not None:
            values |= {"warmup_steps": math.ceil(stage.warmup_share * steps)}
        return TrainConfig.parse(values | {"steps": steps}, where=f"stage {stage.name!r}")

    def weights(self, stage: StageConfig) -> dict[str, float]:
        """Return the share of each source in `stage`, replay included; the shares add up to 1."""
        shares = _normalised(stage.mixture)
        if stage.replay_of is None:
            return shares
        earlier = next(s for s in self.stages if s.name == stage.replay_of)
        replayed = _normalised(earlier.mixture)
        return {
            name: (1 - stage.replay) * shares.get(name, 0.0) + stage.replay * replayed.get(name, 0.0)
            for name in [*shares, *(name for name in replayed if name not in shares)]
        }

    def tokens_before(self, stage: StageConfig) -> int:
        """Return the tokens of the stages before `stage`."""
        return sum(earlier.tokens for earlier in self.stages[: self.stages.index(stage)])


def _normalised(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def with_theta(config: ModelConfig, full: float | None, sliding: float | None) -> ModelConfig:
    """Return `config` with another RoPE base in its full or sliding layers; None leaves them as they are."""
    changed = [
        (full if layer.window is None else sliding) or theta
        for layer, theta in zip(config.layers(), config.rope_theta, strict=True)
    ]
    return config.model_copy(update={"rope_theta": tuple(changed)})
