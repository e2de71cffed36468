"""The demo: every stage's settings, sized for two CPU cores and fifteen minutes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from step35.config.base import Config
from step35.config.data import PrepareConfig
from step35.config.post import EvalConfig, SFTConfig
from step35.config.rl import RLConfig
from step35.config.train import TrainConfig

STAGES = ("prepare", "train", "sft", "rl", "eval")


class DemoConfig(Config):
    """Train, post-train, evaluate and export a Step 3.5 model; run again to continue where it stopped."""

    out: Path = Path("runs/demo")
    """Run directory."""
    seed: int = Field(default=0, ge=0)
    """Seed of every stage."""
    preset: str = "tiny"
    """Model preset to train."""
    prepare: PrepareConfig = PrepareConfig()
    train: TrainConfig = TrainConfig(steps=360, lr=1.2e-2, final_lr=1e-3)
    # Two conversations fill a row of 704 tokens. Half of the phrasings are left for RL to meet.
    sft: SFTConfig = SFTConfig(
        steps=130, phrasings=2, context=704, batch_rows=6, micro_rows=6, lr=4e-3, final_lr=5e-4, warmup_steps=5,
        mtp_joint_from=90, freeze_router=True, balance_rate=0.0, ep_weight=0.0, checkpoint_every=50,
    )  # fmt: skip
    rl: RLConfig = RLConfig(steps=26, actor_lr=6e-4, negative_weight=0.2)
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _one_seed(self) -> DemoConfig:
        for name in STAGES:
            seed = getattr(self, name).seed
            if seed not in (0, self.seed):
                raise ValueError(
                    f"{name}.seed={seed} cannot take effect: the demo's seed={self.seed} is every stage's. "
                    f"Set --seed, or run the stages one by one"
                )
        return self

    def seeded(self) -> DemoConfig:
        """Return the settings with this seed in every stage."""
        return self.model_copy(update={s: getattr(self, s).model_copy(update={"seed": self.seed}) for s in STAGES})
