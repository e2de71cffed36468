"""Rewrite a model tensor by tensor: released layout (safetensors), its FP8 form, or GGUF for llama.cpp, and back.

Weights of a training run are exported while it runs: `step35 convert runs/train out` takes its newest checkpoint.
Other examples: `step35 convert runs/demo/export flash-fp8 --dtype float8`,
`step35 convert runs/demo/export model.gguf --to gguf --dtype q8_0`, `step35 convert model.gguf checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from step35.config.base import Config
from step35.errors import ConfigError

if TYPE_CHECKING:
    from step35.config.model import ModelConfig
    from step35.data.tokenizer import Tokenizer
    from step35.model.tensors import Tensors

REPLACED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "README.md",
)
"""Files of a checkpoint, which a newer one may replace."""
GGUF_FORMS = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}


class Args(Config):
    """From where to where."""

    path: tyro.conf.Positional[Path]
    """Checkpoint folder in the released layout (also FP8), such as runs/demo/rl/model; a .gguf file; a training run
    such as runs/train, or one checkpoint of it, such as runs/train/checkpoints/step_100; hf://ORG/NAME on the hub."""
    out: tyro.conf.Positional[Path]
    """Folder to write; with --to gguf, a file that ends in .gguf."""
    to: Literal["safetensors", "gguf"] = "safetensors"
    """The released layout, which transformers, vLLM and SGLang read, or GGUF, which llama.cpp reads."""
    dtype: Literal["float32", "bfloat16", "float16", "float8", "q8_0"] = "bfloat16"
    """safetensors: any but q8_0, float8 in blocks of 128 x 128. GGUF: float32, bfloat16 or q8_0. Router weights stay
    float32."""
    mtp: int | None = None
    """Keep only the first so many MTP modules; 0 keeps the trunk and its head. All, if not given."""


def main(args: Args) -> int:
    """Check the source, write, and check what was written."""
    from step35.data.gguf_vocabulary import gguf_tokenizer
    from step35.data.tokenizer import load_tokenizer
    from step35.model.gguf import GGUFTensors
    from step35.model.layout import released_parts
    from step35.model.tensors import Watched
    from step35.model.weights import open_checkpoint
    from step35.runtime.console import Console
    from step35.runtime.hub import fetched

    _check_target(args)
    path = fetched(args.path)
    config, source = open_checkpoint(path, mtp=args.mtp)
    # A .gguf file with the release's vocabulary takes seconds to open: once is enough.
    tokenizer = gguf_tokenizer(source) if isinstance(source, GGUFTensors) else load_tokenizer(path)
    with Console().stage(f"convert to {args.to}", len(list(released_parts(config))), "tensor") as shown:
        _write(args, config, Watched(source, shown.advance), tokenizer)
    open_checkpoint(args.out)
    files = args.out.iterdir() if args.out.is_dir() else [args.out]
    print(f"{args.out}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB, {args.dtype}")
    return 0


def _check_target(args: Args) -> None:
    """Refuse a target that would destroy something, or a format that it cannot have."""
    from step35.cli.stages import check_beside

    source, out = args.path.resolve(), args.out.resolve()
    if out == source or out in source.parents:
        raise ConfigError(f"out={args.out} is or holds what is read, {args.path}; choose another one.")
    if args.to == "gguf":
        if args.dtype not in GGUF_FORMS:
            raise ConfigError(f"dtype={args.dtype} is not a GGUF format here; choose one of {', '.join(GGUF_FORMS)}.")
        if out.suffix != ".gguf" or out.is_dir():
            raise ConfigError(f"out={args.out} must be a file that ends in .gguf.")
        return
    if out.suffix == ".gguf":
        raise ConfigError(f"out={args.out} ends in .gguf; add --to gguf, or name a folder.")
    if args.dtype == "q8_0":
        raise ConfigError("dtype=q8_0 exists in GGUF files only; add --to gguf, or choose float8.")
    if out == Path.cwd():
        raise ConfigError(f"out={args.out} is the current folder, which cannot be replaced; name another one.")
    check_beside(out)
    is_checkpoint = (out / "config.json").is_file() and any(out.glob("*.safetensors"))
    if out.exists() and not is_checkpoint and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={args.out} exists and is not a checkpoint folder; choose a new or an empty one.")
    foreign = sorted(file.name for file in out.glob("*") if not any(map(file.match, REPLACED)))
    if foreign:
        raise ConfigError(
            f"out={args.out} is a checkpoint, but also holds {', '.join(foreign[:5])}; replacing it would remove them. "
            "Move them away, or choose another folder."
        )


def _write(args: Args, config: ModelConfig, source: Tensors, tokenizer: Tokenizer) -> None:
    if args.to == "gguf":
        from step35.data.gguf_vocabulary import vocabulary_keys
        from step35.model.gguf import write_gguf

        keys = vocabulary_keys(tokenizer, config)
        write_gguf(source, config, args.out, form=GGUF_FORMS[args.dtype], vocabulary=keys, name=args.out.stem)
    else:
        from step35.cli.stages import publish_tensors

        publish_tensors(source, config, tokenizer, args.out, dtype=args.dtype)
