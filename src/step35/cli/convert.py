"""Write a model in the released layout (config.json, safetensors, tokenizer, chat template) in another dtype."""

from __future__ import annotations

from pathlib import Path

import tyro

from step35.config.base import Config


class Args(Config):
    """From where to where."""

    path: tyro.conf.Positional[Path]
    """Checkpoint folder in the released layout, such as runs/demo/rl/model."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16; router weights and biases stay float32."""


def main(args: Args) -> int:
    """Load, write and reload as a check."""
    from step35.cli.stages import publish
    from step35.data.tokenizer import load_tokenizer
    from step35.errors import ConfigError
    from step35.model.weights import load_model

    source, out = args.path.resolve(), args.out.resolve()
    if out == source or out in source.parents:
        raise ConfigError(f"out={args.out} holds the folder to read, {args.path}; choose another one.")
    is_checkpoint = (out / "config.json").is_file() and any(out.glob("*.safetensors"))
    if out.exists() and not is_checkpoint and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={args.out} exists and is not a checkpoint folder; choose a new or an empty one.")
    publish(load_model(args.path), load_tokenizer(args.path), args.out, dtype=args.dtype)
    load_model(args.out)
    size = sum(file.stat().st_size for file in args.out.iterdir()) / 1e6
    print(f"{args.out}: {size:.1f} MB, {args.dtype}")
    return 0
