"""Clip the weights of a checkpoint's experts: where max |W x| over given text exceeds tau, W is scaled down to it.

Examples: `step35 clip runs/demo/export clipped --tau 30 --data runs/demo/data`,
`step35 clip runs/demo/export clipped --tau 30 --text notes.txt`. It only delays a blow-up (docs/stability.md);
activation clipping, `swiglu_limits` of a model's config, bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from pydantic import Field

from step35.config.base import Config
from step35.errors import ConfigError, DataError

if TYPE_CHECKING:
    from step35.data.packing import Batch
    from step35.data.tokenizer import Tokenizer


class Args(Config):
    """What to clip, by which text, and where to write it."""

    path: tyro.conf.Positional[Path]
    """Checkpoint folder in the released layout, .gguf file, training run (its newest checkpoint), or hf://ORG/NAME
    on the hub."""
    out: tyro.conf.Positional[Path]
    """Folder to write; must not exist."""
    tau: float = Field(gt=0)
    """Largest |W x| to leave, Euclidean norm."""
    text: Path | None = None
    """Text file to run the model over."""
    data: Path | None = None
    """Folder made by `step35 prepare`, to run the model over its training rows."""
    rows: int = Field(default=64, ge=1)
    """Rows to run over, at most."""
    context: int = Field(default=512, ge=8)
    """Tokens of a row."""


def main(args: Args) -> int:
    """Measure, clip, write; print what was clipped."""
    from step35.cli.stages import check_beside, publish
    from step35.data.tokenizer import load_tokenizer
    from step35.model.weights import load_model
    from step35.runtime.console import Console
    from step35.runtime.hub import fetched
    from step35.train.weight_clipping import clip_weights, largest_products

    if (args.text is None) == (args.data is None):
        raise ConfigError(
            "give either --text FILE or --data FOLDER: what the model is run over decides what is clipped."
        )
    if args.out.exists():
        raise ConfigError(f"out={args.out} exists; choose a new folder.")
    check_beside(args.out)
    path, console = fetched(args.path), Console()
    model, tokenizer = load_model(path), load_tokenizer(path)
    largest = largest_products(model, _batches(args, tokenizer))
    rows = [
        [f"layer {layer}", *(f"{figure:.4g}" for x_E in largest_3E for figure in (x_E.max(), x_E.median()))]
        for layer, largest_3E in largest.items()
    ]
    columns = [f"{name}, {figure}" for name in ("gate", "up", "down") for figure in ("max", "median")]
    console.table("max |W x| over tokens: the largest of a layer's experts and their median", ["", *columns], rows)
    clipped = clip_weights(model, largest, args.tau)
    for entry in clipped:
        console.print(
            f"layer {entry.layer}, expert {entry.expert}, {entry.projection}: {entry.largest:.4g} -> {args.tau}"
        )
    publish(model, tokenizer, args.out)
    console.print(f"{len(clipped)} matrices clipped; {args.out}")
    return 0


def _batches(args: Args, tokenizer: Tokenizer) -> Iterator[Batch]:
    """Yield the rows one by one."""
    import numpy as np

    from step35.data.packing import Batch

    if args.data is not None:
        from step35.data.loader import PretrainLoader
        from step35.data.prepare import PreparedData

        prepared = PreparedData.load(args.data)
        if prepared.tokenizer.vocab_size != tokenizer.vocab_size:
            raise DataError(
                f"{args.data} was tokenised for a vocabulary of {prepared.tokenizer.vocab_size}, the model has "
                f"{tokenizer.vocab_size}; use the data that the model was trained on, or --text."
            )
        loader = PretrainLoader(prepared.train, args.context, seed=0)
        yield from (loader.rows(row, 1) for row in range(min(args.rows, loader.rows_per_epoch)))
        return
    assert args.text is not None
    try:
        ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.rows * args.context]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {args.text} cannot be read: {error}.") from None
    if not ids:
        raise DataError(f"--text {args.text} is empty; give a text like those the model will meet.")
    for start in range(0, len(ids), args.context):
        tokens = np.array([ids[start : start + args.context]])
        yield Batch(tokens, np.zeros_like(tokens), np.ones_like(tokens, dtype=bool))
