"""Train a model through the stages of a recipe, each from where the one before ended. Run again to continue."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from pydantic import Field

from step35.config.base import Config
from step35.config.load import load_file
from step35.config.recipe import RecipeConfig, StageConfig
from step35.config.train import TrainConfig
from step35.errors import ConfigError

if TYPE_CHECKING:
    from step35.runtime.console import Console

MEASURABLE_PARAMETERS = 1_000_000_000
"""Largest model whose updates `--measure` times here."""


class Args(Config):
    """Settings of the run; everything about the training itself stands in the recipe."""

    recipe: tyro.conf.Positional[Path]
    """The recipe, a TOML file such as recipes/cpu.toml."""
    out: Path = Path("runs/curriculum")
    """Run directory; each stage is a run directory inside it."""
    dry_run: bool = False
    """Print the timeline and stop: steps, tokens, hours."""
    rate: float | None = Field(default=None, gt=0)
    """Tokens per second to reckon the timeline's hours with."""
    measure: bool = False
    """Time updates of every stage on this machine for the timeline's hours, instead of a stated rate."""


def main(args: Args) -> int:
    """Run every stage that is not done yet."""
    from step35.runtime.console import Console
    from step35.runtime.device import set_threads
    from step35.runtime.rundir import RunDir

    recipe = load_file(args.recipe, RecipeConfig)
    set_threads()
    if args.dry_run:
        show_timeline(recipe, args, Console())
        return 0
    if args.rate is not None or args.measure:
        raise ConfigError("--rate and --measure only shape the timeline; add --dry-run.")
    from step35.cli.recipe import run_recipe

    run = RunDir(args.out)
    run_recipe(run, recipe, Console(run.path / "console.log"))
    return 0


def show_timeline(recipe: RecipeConfig, args: Args, console: Console) -> None:
    """Print the stages, what they change, and how long they take at a stated or measured rate."""
    from step35.cli.dry_run import describe_training
    from step35.cli.recipe import architecture, check_recipe

    check_recipe(recipe)
    if args.rate and args.measure:
        raise ConfigError("--rate states what --measure would find; give one of them.")
    timeline, changes = [], []
    hours = 0.0
    for stage in recipe.stages:
        config = recipe.training(stage)
        rate = args.rate or (measured_rate(recipe, stage) if args.measure else None)
        took = f"{stage.tokens / rate / 3600:,.2f}" if rate else "-"
        hours += stage.tokens / rate / 3600 if rate else 0.0
        timeline.append(
            (stage.name, _tokens(stage.tokens), f"{config.steps:,}", f"{config.context:,}", _rows(config), _lr(config),
             f"{rate:,.0f}" if rate else "-", took)
        )  # fmt: skip
        changes.append((stage.name, _data(recipe, stage), _theta(recipe, stage), _balance(config), _mtp(config)))
    total = sum(stage.tokens for stage in recipe.stages)
    timeline.append(("in all", _tokens(total), "", "", "", "", "", f"{hours:,.2f}" if hours else "-"))
    columns = ["stage", "tokens", "steps", "context", "rows", "learning rate", "tokens/s", "hours"]
    console.table(f"timeline of {args.recipe}, preset {recipe.preset}", columns, timeline)
    console.table("what each stage changes", ["stage", "data", "theta full", "balance", "MTP"], changes)
    last = recipe.stages[-1]
    shape = architecture(recipe, last, recipe.prepare.vocab_size)
    describe_training(shape, recipe.training(last), console, tokens=total)
    if not hours:
        console.print("for hours, state a rate (--rate TOKENS_PER_SECOND), or time a small model here (--measure)")


def measured_rate(recipe: RecipeConfig, stage: StageConfig) -> float:
    """Return the tokens per second of one full batch's update on this machine, after one to warm up."""
    import torch

    from step35.cli.recipe import architecture
    from step35.config.cost import parts
    from step35.data.packing import Batch
    from step35.model.init import initialise
    from step35.model.step35 import Step35
    from step35.runtime.device import pick_device, reuse_memory
    from step35.runtime.seeding import generator
    from step35.train.step import Learner

    config = recipe.training(stage)
    shape = architecture(recipe, stage, recipe.prepare.vocab_size)
    if sum(part.total for part in parts(shape)) > MEASURABLE_PARAMETERS:
        raise ConfigError(f"preset={recipe.preset!r} is too large to time here; state a rate: --rate TOKENS_PER_SECOND")
    reuse_memory()
    model = Step35(shape)
    initialise(model, generator(0, "init"))
    learner = Learner(model.to(pick_device("auto")), config)
    tokens = torch.randint(shape.vocab_size, (config.batch_rows, config.context)).numpy()
    batch = Batch(tokens, tokens * 0, tokens >= 0)
    seconds = []
    for step in range(2):
        started = time.perf_counter()
        learner.update(batch, step)
        seconds.append(time.perf_counter() - started)
    return tokens.size / min(seconds)


def _tokens(count: int) -> str:
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.4g}{name}"
    return f"{count:,}"


def _rows(config: TrainConfig) -> str:
    return " > ".join(f"{rows:,}" for _, rows in config.phases)


def _lr(config: TrainConfig) -> str:
    warmup = f"{config.warmup_steps:,} steps up to " if config.warmup_steps else ""
    law = f", {config.decay} to {config.last_lr:g}" if config.decay != "constant" else ", constant"
    return f"{warmup}{config.lr:g}{law}"


def _data(recipe: RecipeConfig, stage: StageConfig) -> str:
    if stage.conversations:
        return f"conversations: {stage.conversations}"
    shares = ", ".join(f"{name} {share:.1%}" for name, share in recipe.weights(stage).items())
    replay = f"; {stage.replay:.1%} replays {stage.replay_of}" if stage.replay_of else ""
    masked = stage.mask_meta_from_tokens
    meta = f"; meta lines leave the loss at {_tokens(masked)}" if masked is not None else ""
    return shares + replay + meta


def _theta(recipe: RecipeConfig, stage: StageConfig) -> str:
    from step35.cli.recipe import architecture

    layers = architecture(recipe, stage, recipe.prepare.vocab_size).trunk_layers()
    return ", ".join(f"{theta:,.0f}" for theta in dict.fromkeys(la.rope_theta for la in layers if la.window is None))


def _balance(config: TrainConfig) -> str:
    if config.freeze_router:
        return "router frozen"
    end = f" to {config.final_balance_rate:g}" if config.final_balance_rate is not None else ""
    return f"bias {config.balance_rate:g}{end}, EP loss {config.ep_weight:g}"


def _mtp(config: TrainConfig) -> str:
    joint = "" if config.mtp_joint_from is None else f", all modules from step {config.mtp_joint_from}"
    return f"weight {config.mtp_weight:g}{joint}"
