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

# fp32 weight, gradient and momentum under Muon; AdamW keeps one more.
BYTES = {"muon": 12, "adamw": 16}


def show_settings(settings: Config, console: Console) -> None:
    """Print the resolved settings as JSON, which `--config` takes back."""
    console.print(settings.model_dump_json(indent=1, exclude={"dry_run"}))


def describe_training(model_config: ModelConfig, config: TrainConfig, console: Console) -> None:
    """Print who gets which optimiser, and what the run costs; the model is built on the meta device."""
    with torch.device("meta"):
        named = dict(Step35(model_config).named_parameters())
    rows = []
    table = assign(model_config, named, config.optim.kind)
    for row in table:
        shape = " x ".join(map(str, named[row.name].shape))
        rows.append((row.name, shape, row.optimiser, len(row.sizes) or 1, "yes" if row.decays else "no"))
    console.table("who gets which optimiser", ["parameter", "shape", "optimiser", "packed matrices", "decay"], rows)
    total = sum(p.numel() for p in named.values())
    active = sum(part.active for part in parts(model_config))
    tokens = config.tokens_until(config.steps)
    figures = [
        ("parameters", f"{total:,}"),
        ("active for one token, embeddings, heads and MTP included", f"{active:,}"),
        ("weights, gradients and optimiser state", f"{state_bytes(named, table) / 1e9:.2f} GB"),
        ("memory of this machine", f"{memory_bytes() / 1e9:.2f} GB"),
        ("tokens", f"{tokens:,} ({config.steps} steps of {config.batch_rows * config.context:,} at the end)"),
        ("training FLOPs (6 x active x tokens, without attention scores)", f"{6.0 * active * tokens:.3g}"),
    ]
    console.table("dry run", ["figure", "value"], figures)


def describe_rl(model_config: ModelConfig, config: RLConfig, console: Console) -> None:
    """Print what rollouts, actor and critic of an RL run cost."""
    with torch.device("meta"):
        model = Step35(model_config)
        actor, critic = (dict(role.named_parameters()) for role in (model, make_critic(model)))
    learning = [state_bytes(named, assign(model_config, named, "muon")) for named in (actor, critic)]
    sampler = 4 * sum(p.numel() for p in actor.values())
    responses = config.steps * config.prompts * config.responses
    figures = [
        ("parameters of the actor", f"{sum(p.numel() for p in actor.values()):,}"),
        ("parameters of the critic", f"{sum(p.numel() for p in critic.values()):,}"),
        ("both learners and the sampler's copy", f"{(sum(learning) + sampler) / 1e9:.2f} GB"),
        ("memory of this machine", f"{memory_bytes() / 1e9:.2f} GB"),
        ("responses", f"{responses:,} ({config.steps} rounds of {config.prompts} x {config.responses})"),
        ("sampled tokens, at most", f"{responses * config.max_turns * config.max_turn_tokens:,}"),
        ("actor updates", f"{config.steps * config.actor_batches:,}"),
        ("critic updates", f"{config.steps * config.critic_batches:,}"),
    ]
    console.table("dry run", ["figure", "value"], figures)


def state_bytes(named: Mapping[str, torch.Tensor], table: Sequence[Assignment]) -> int:
    """Return the bytes of weights, gradients and optimiser state."""
    return sum(named[row.name].numel() * BYTES[row.optimiser] for row in table)
