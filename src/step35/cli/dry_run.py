"""What `--dry-run` prints of a training run: parameters, optimisers, memory and FLOPs, before anything is spent."""

from __future__ import annotations

import torch

from step35.config.model import ModelConfig
from step35.config.train import TrainConfig
from step35.model.step35 import Step35
from step35.runtime.console import Console
from step35.train.groups import assign

# fp32 weight, gradient and momentum under Muon; AdamW keeps one more.
BYTES = {"muon": 12, "adamw": 16}


def describe(model_config: ModelConfig, config: TrainConfig, console: Console) -> None:
    """Print the tables; nothing is allocated, the model is built on the meta device."""
    with torch.device("meta"):
        model = Step35(model_config)
    named = dict(model.named_parameters())
    table = assign(model_config, named, config.optim.kind)
    rows = []
    for row in table:
        shape = " x ".join(map(str, named[row.name].shape))
        rows.append((row.name, shape, row.optimiser, len(row.sizes) or 1, "yes" if row.decays else "no"))
    console.table("who gets which optimiser", ["parameter", "shape", "optimiser", "packed matrices", "decay"], rows)
    total = sum(p.numel() for p in named.values())
    state = sum(named[row.name].numel() * BYTES[row.optimiser] for row in table)
    idle = idle_parameters(model_config)
    tokens = config.steps * config.batch_tokens
    figures = [
        ("parameters", f"{total:,}"),
        ("active for one token, embeddings, heads and MTP included", f"{total - idle:,}"),
        ("weights, gradients and optimiser state", f"{state / 1e9:.2f} GB"),
        ("tokens", f"{tokens:,} ({config.steps} steps of {config.batch_tokens:,})"),
        ("training FLOPs (6 x active x tokens, without attention scores)", f"{6.0 * (total - idle) * tokens:.3g}"),
    ]
    console.table("dry run", ["figure", "value"], figures)


def idle_parameters(config: ModelConfig) -> int:
    """Return the parameters of the experts that one token does not visit."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return len(config.moe_layers_enum) * (config.moe_num_experts - config.moe_top_k) * expert
