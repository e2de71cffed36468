"""Say what a model costs: parameters by part, cache, FLOPs and bytes read for a token. Builds nothing, needs no torch.

Examples: `step35 inspect flash`, `step35 inspect runs/demo/export --context 1024 8192`, `step35 inspect flash --json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from step35.config.base import Config
from step35.config.cost import active_parameters, cost, parts, trunk_parameters
from step35.config.model import ModelConfig
from step35.config.presets import PRESETS, preset
from step35.errors import ConfigError

BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}


class Args(Config):
    """Which model, at which lengths."""

    model: tyro.conf.Positional[str]
    """A preset (tiny, mini, flash), or a checkpoint folder."""
    context: tuple[Annotated[int, Field(ge=1)], ...] = (4096, 32_768, 131_072, 262_144)
    """Lengths to cost, in tokens."""
    weights: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    """Format of the weights that decoding reads."""
    cache: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    """Format of keys and values."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON for programs."""


def main(args: Args) -> int:
    """Print the tables, or JSON."""
    config = model_config(args.model)
    found = examine(config, args)
    if args.as_json:
        print(json.dumps(found, indent=1))
        return 0
    from step35.cli.doctor import amount
    from step35.runtime.console import Console

    console = Console()
    rows = [
        (p["part"], f"{p['total']:,}", f"{p['active']:,}", f"{p['total'] / found['total']:.1%}") for p in found["parts"]
    ]
    console.table(args.model, ["part", "parameters", "used by one token", "share"], rows)
    sums = [
        ("trunk", f"{found['trunk']:,}"),
        ("active for one token, without embedding and output head", f"{found['active']:,}"),
        ("with MTP", f"{found['total']:,}"),
        (f"weights in {args.weights}", amount(found["weight_bytes"], "B")),
    ]
    console.table("in all", ["what", "parameters or bytes"], sums)
    costs = [
        (
            f"{c['context']:,}",
            amount(c["cache_bytes"], "B"),
            amount(c["prefill_flops"], ""),
            amount(c["decode_flops"], ""),
            amount(c["read_bytes"], "B"),
        )
        for c in found["costs"]
    ]
    heads = [
        "context",
        f"cache ({args.cache})",
        "prefill FLOPs a token",
        "decode FLOPs a token",
        "read a decoded token",
    ]
    console.table("one sequence", heads, costs)
    return 0


def model_config(name: str) -> ModelConfig:
    """Return a preset's config or that of a checkpoint folder."""
    if name in PRESETS:
        return preset(name)
    if not Path(name).is_dir():
        raise ConfigError(f"'{name}' is neither a preset ({', '.join(PRESETS)}) nor a folder.")
    return ModelConfig.read(name)


def examine(config: ModelConfig, args: Args) -> dict[str, Any]:
    """Return the figures that the tables show."""
    rows = parts(config)
    total = sum(part.total for part in rows)
    widths = {"weight_bytes": BYTES[args.weights], "cache_bytes": BYTES[args.cache]}
    return {
        "parts": [{"part": part.name, "total": part.total, "active": part.active} for part in rows],
        "trunk": trunk_parameters(config),
        "active": active_parameters(config),
        "total": total,
        "weight_bytes": total * BYTES[args.weights],
        "costs": [vars(cost(config, length, **widths)) for length in args.context],
    }
