"""Say what a model costs: parameters by part, cache, FLOPs and bytes read for a token, decoding speed at best.

Builds nothing, and needs torch only to measure this CPU (`--hardware cpu`).
Examples: `step35 inspect flash`, `step35 inspect runs/demo/export --context 1024 8192`, `step35 inspect flash --json`,
`step35 inspect --layouts`, `step35 inspect flash --hardware h100 --weights float8`, `step35 inspect scale-12 --layers`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field

from step35.cli import decode_speed, inspect_tables, layer_map
from step35.config.base import Config
from step35.config.cost import active_parameters, cost, parts, trunk_parameters
from step35.config.hardware import BYTES, COLLECTIVE_S, Format
from step35.config.model import ModelConfig
from step35.config.presets import PRESET_NAMES, is_preset, preset
from step35.config.roofline import Setup
from step35.config.scale import LAWS, scale_layers, suggest_training
from step35.config.table8 import Entry, entries
from step35.errors import ConfigError
from step35.runtime.hub import fetched

NEEDS_HARDWARE = ("gpus", "acceptance", "flops", "bandwidth", "batch", "collective_us")

ALONE = ("model", "context", "weights", "cache", "layers", "svg", "hardware")
"""Settings that `--layouts` does not heed."""


class Args(Config):
    """Which model, at which lengths, and what else to show."""

    model: tyro.conf.Positional[str] = "flash"
    """A preset (tiny, mini, 30b-a3b, 100b-a10b, flash, or scale-N with N trunk layers), a checkpoint folder, a .gguf
    file, or an address on the hub (hf://ORG/NAME)."""
    context: tuple[Annotated[int, Field(ge=1)], ...] = (4096, 32_768, 131_072, 262_144)
    """Lengths to cost, in tokens."""
    weights: Format = "bfloat16"
    """Format of the weights that decoding reads; float8 takes one byte for every weight, though FP8 checkpoints keep
    embeddings and heads in bfloat16."""
    cache: Format = "bfloat16"
    """Format of keys and values."""
    layouts: bool = False
    """Show the report's Table 8 instead: FLOPs of four attention layouts, ours and the report's."""
    layers: bool = False
    """Add the map of the layers."""
    svg: Path | None = None
    """Draw the map of the layers into this file."""
    hardware: str | None = None
    """Add the decoding speed at best on h100, h800, h200, b200, a100 or cpu (this machine, measured)."""
    gpus: Annotated[int, Field(ge=1)] | None = None
    """Devices that share the model; 8, or 1 for cpu."""
    batch: tuple[Annotated[int, Field(ge=1)], ...] = (1, 8, 32, 128)
    """Sequences decoded together."""
    acceptance: tuple[float, ...] | None = None
    """Probability that each MTP depth's draft is accepted if the one before was; 0.9 0.8 0.7 is assumed."""
    flops: Annotated[float, Field(gt=0)] | None = None
    """Peak FLOP/s of a device, in place of the data sheet's or the measured one."""
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    """Bytes/s a device reads, in place of the data sheet's or the measured ones."""
    collective_us: Annotated[float, Field(ge=0)] = COLLECTIVE_S * 1e6
    """Microseconds of a small all-reduce between the devices."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON for programs."""


def main(args: Args) -> int:
    """Print the tables, or JSON; draw the map if asked."""
    _refuse_idle(args)
    config = model_config(args.model)
    table8 = entries() if args.layouts else []
    found: dict[str, Any] = {"layouts": [_entry(entry) for entry in table8]} if args.layouts else examine(config, args)
    if args.svg is not None:
        _write(args.svg, layer_map.svg(config, f"{args.model}: {config.num_hidden_layers} layers"))
    if args.as_json:
        print(json.dumps(found, indent=1))
        return 0
    from step35.runtime.console import Console

    console = Console()
    if args.layouts:
        inspect_tables.show_layouts(table8, console)
        return 0
    inspect_tables.show_costs(args, found, console)
    if args.layers:
        inspect_tables.show_layers(config, console)
    if "training" in found:
        inspect_tables.show_scale(args.model, config, suggest_training(config), console)
    if "speed" in found:
        decode_speed.show(found["speed"], console)
    return 0


def model_config(name: str) -> ModelConfig:
    """Return a preset's config, or that of a checkpoint folder or .gguf file, here or on the hub."""
    if is_preset(name):
        return preset(name)
    path = fetched(name, files=["config.json"])
    if not path.is_dir() and path.suffix != ".gguf":
        raise ConfigError(f"'{name}' is neither a preset ({PRESET_NAMES}) nor a folder or .gguf file.")
    if (path / "config.json").is_file():
        return ModelConfig.read(path)
    from step35.model.weights import read_config  # imports torch, which takes longer than all else here

    return read_config(path)


def examine(config: ModelConfig, args: Args) -> dict[str, Any]:
    """Return the figures that the tables show."""
    rows = parts(config)
    total = sum(part.total for part in rows)
    widths = {"weight_bytes": BYTES[args.weights], "cache_bytes": BYTES[args.cache]}
    found: dict[str, Any] = {
        "parts": [{"part": part.name, "total": part.total, "active": part.active} for part in rows],
        "trunk": trunk_parameters(config),
        "active": active_parameters(config),
        "total": total,
        "weight_bytes": total * BYTES[args.weights],
        "costs": [vars(cost(config, length, **widths)) for length in args.context],
    }
    if args.layers:
        found["layers"] = layer_map.rows(config)
    if scale_layers(args.model) is not None:
        found["training"] = asdict(suggest_training(config))
        found["laws"] = {what: {"law": law, "source": source} for what, (law, source) in LAWS.items()}
    if args.hardware is not None:
        setup = _setup(config, args, args.hardware)
        found["speed"] = decode_speed.examine(config, setup, batches=args.batch, contexts=args.context)
    return found


def _setup(config: ModelConfig, args: Args, name: str) -> Setup:
    acceptance = args.acceptance
    if acceptance is None:
        acceptance = decode_speed.ASSUMED[: config.num_nextn_predict_layers]
    return Setup(
        hardware=decode_speed.hardware(name, weights=args.weights, flops=args.flops, bandwidth=args.bandwidth),
        gpus=args.gpus or (1 if name == "cpu" else 8),
        weights=args.weights,
        cache=args.cache,
        acceptance=acceptance,
        collective_s=args.collective_us / 1e6,
    )


def _refuse_idle(args: Args) -> None:
    """Raise `ConfigError` for settings that would change nothing."""
    idle = [name for name in NEEDS_HARDWARE if getattr(args, name) != Args.model_fields[name].default]
    if args.hardware is None and idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ConfigError(f"{flags} has no effect without --hardware; add --hardware h100, for example.")
    asked = [name for name in ALONE if getattr(args, name) != Args.model_fields[name].default]
    if args.layouts and asked:
        raise ConfigError(
            f"--layouts shows the report's Table 8 alone; {', '.join(asked)} would change nothing. Leave it out."
        )


def _entry(entry: Entry) -> dict[str, Any]:
    deviations = {"prefill_deviation": entry.prefill_deviation, "decode_deviation": entry.decode_deviation}
    return {**asdict(entry), **deviations}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--svg {path} cannot be written ({error.strerror}); give a file in a folder that exists."
        ) from None
