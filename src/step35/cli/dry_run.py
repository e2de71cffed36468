"""What `--dry-run` prints before anything is spent: the resolved settings, then what they will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from step35.config.base import Config
from step35.config.cost import parts
from step35.config.model import ModelConfig
from step35.config.rl import RLConfig
from step35.config.train import TrainConfig
from step35.model.step35 import Step35
from step35.post.rl.critic import make_critic
from step35.runtime.console import Console
from step35.runtime.machine import memory_bytes
from step35.train.groups import Assignment, assign
from step35.train.step import check_fit

# fp32 weight, gradient and momentum under Muon; AdamW keeps one more.
BYTES = {"muon": 12, "adamw": 16}
BF16_COPY = 2
"""Bytes of a weight that is kept in bf16 beside its master (`train/master.py`)."""


def show_settings(settings: Config, console: Console) -> None:
    """Print the resolved settings as JSON, which `--config` takes back."""
    console.print(settings.model_dump_json(indent=1, exclude={"dry_run"}))


def describe_training(
    model_config: ModelConfig, config: TrainConfig, console: Console, *, tokens: int | None = None
) -> None:
    """Print who gets which optimiser, and what the run costs; the model is built on the meta device.

    `tokens` are those of all stages, where `config` is the last one. Raises `ConfigError` where the two do not fit.
    """
    check_fit(model_config, config)
    with torch.device("meta"):
        named = dict(Step35(model_config).named_parameters())
    table = assign(model_config, named, config.optim.kind)
    console.table(
        "who gets which optimiser",
        ["parameter", "layers", "shape", "optimiser", "packed", "decay"],
        assignment_rows(named, table),
    )
    total = sum(p.numel() for p in named.values())
    active = sum(part.active for part in parts(model_config))
    tokens = tokens or config.tokens_until(config.steps)
    state = state_bytes(named, table) + (BF16_COPY * total if config.param_dtype == "bfloat16" else 0)
    figures = [
        ("parameters", f"{total:,}"),
        ("active for one token, embeddings, heads and MTP included", f"{active:,}"),
        ("weights, gradients and optimiser state", f"{state / 1e9:.2f} GB"),
        ("memory of this machine", f"{memory_bytes() / 1e9:.2f} GB"),
        ("tokens", f"{tokens:,} ({config.steps} steps of {config.batch_rows * config.context:,} at the end)"),
        ("training FLOPs (6 x active x tokens, without attention scores)", f"{6.0 * active * tokens:.3g}"),
    ]
    console.table("dry run", ["figure", "value"], figures)


def assignment_rows(named: Mapping[str, torch.Tensor], table: Sequence[Assignment]) -> list[tuple[str | int, ...]]:
    """Return the table's rows; parameters that differ in their layer alone share one, with N for its number."""
    counts: dict[tuple[str | int, ...], int] = {}
    for row in table:
        name = ".".join("N" if part.isdigit() else part for part in row.name.split("."))
        shape = " x ".join(map(str, named[row.name].shape))
        key = (name, shape, row.optimiser, len(row.sizes) or 1, "yes" if row.decays else "no")
        counts[key] = counts.get(key, 0) + 1
    return [(name, count, *rest) for (name, *rest), count in counts.items()]


def describe_rl(model_config: ModelConfig, config: RLConfig, console: Console) -> None:
    """Print what rollouts, actor and critic of an RL run cost."""
    with torch.device("meta"):
        model = Step35(model_config)
        actor, critic = (dict(role.named_parameters()) for role in (model, make_critic(model)))
    learning = [state_bytes(named, assign(model_config, named, "muon")) for named in (actor, critic)]
    sampler = 4 * sum(p.numel() for p in actor.values())
    responses = config.steps * config.prompts * config.responses
    drafter = config.steps * min(config.mtp_batches, config.actor_batches) if model.mtp and config.mtp_lr else 0
    figures = [
        ("parameters of the actor", f"{sum(p.numel() for p in actor.values()):,}"),
        ("parameters of the critic", f"{sum(p.numel() for p in critic.values()):,}"),
        ("both learners and the sampler's copy", f"{(sum(learning) + sampler) / 1e9:.2f} GB"),
        ("memory of this machine", f"{memory_bytes() / 1e9:.2f} GB"),
        ("responses", f"{responses:,} ({config.steps} rounds of {config.prompts} x {config.responses})"),
        ("sampled tokens, at most", f"{responses * config.max_turns * config.max_turn_tokens:,}"),
        ("actor updates", f"{config.steps * config.actor_batches:,}"),
        ("updates of the MTP modules", f"{drafter:,}"),
        ("critic updates", f"{config.steps * config.critic_batches:,}"),
    ]
    console.table("dry run", ["figure", "value"], figures)


def state_bytes(named: Mapping[str, torch.Tensor], table: Sequence[Assignment]) -> int:
    """Return the bytes of weights, gradients and optimiser state."""
    return sum(named[row.name].numel() * BYTES[row.optimiser] for row in table)
