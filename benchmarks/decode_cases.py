"""The checkpoints and prompts of `benchmarks/decode.py`: `tiny` is the shipped model, `mini` has random weights."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from step35.cli.convert import Args as ConvertArgs
from step35.cli.convert import main as convert
from step35.cli.shipped import SHIPPED
from step35.cli.stages import environment, publish
from step35.config.model import ModelConfig
from step35.config.presets import preset
from step35.data import chat
from step35.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.model.weights import open_checkpoint

FIRST_ID = 16
"""Prompts are random ids from here on, behind the special tokens."""
MODULES = 3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Lengths and numbers of what is measured."""

    prompt: int
    batch: int
    prefill: Sequence[int]
    repeats: int
    tasks: int


@dataclass(frozen=True)
class Case:
    """One model in the forms that the engines read, and what it is asked."""

    name: str
    config: ModelConfig
    checkpoint: Path
    ggufs: dict[str, Path]
    """By the dtype of their weights."""
    rounds: list[dict[str, Any]]
    tasks: list[list[int]]
    """Prompts of the shipped model's tasks; none for random weights, whose drafts are all wrong."""


def build(name: str, folder: Path, *, dtype: str, shape: Shape) -> Case:
    """Write the checkpoint and its GGUF files under `folder`."""
    checkpoint = folder / name
    if name == "tiny":
        checkpoint = SHIPPED
    else:
        _random_model(name, checkpoint, dtype)
    config, _ = open_checkpoint(checkpoint)
    ggufs = {form: folder / f"{name}-{form}.gguf" for form in (dtype, "q8_0")}
    for form, file in ggufs.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            convert(ConvertArgs.model_validate({"path": checkpoint, "out": file, "to": "gguf", "dtype": form}))
    tasks = shipped_tasks(load_tokenizer(checkpoint), shape.tasks) if name == "tiny" else []
    return Case(name, config, checkpoint, ggufs, make_rounds(config.vocab_size, shape), tasks)


def make_rounds(vocabulary: int, shape: Shape) -> list[dict[str, Any]]:
    """Return the prompts of the warm-up and of each repeat, all different."""
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(FIRST_ID, vocabulary) for _ in range(count)]

    return [
        {
            "single": ids(shape.prompt),
            "batch": [ids(shape.prompt) for _ in range(shape.batch)],
            "prefill": [ids(length) for length in shape.prefill],
        }
        for _ in range(shape.repeats + 1)
    ]


def shipped_tasks(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Return the prompts of held-out problems with the calculator on offer."""
    tasks = [environment("held_out", 0).sample(i) for i in range(count)]
    return [chat.encode_prompt(tokenizer, task.messages, task.tools) for task in tasks]


def _random_model(name: str, folder: Path, dtype: str) -> None:
    config = preset(name).with_mtp(MODULES)
    model = Step35(config).eval()
    initialise(model, torch.Generator().manual_seed(0))
    publish(model, _tokenizer(config.vocab_size), folder, dtype=dtype)


def _tokenizer(size: int) -> Tokenizer:
    """Return a tokenizer of exactly `size` tokens, made of random words."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randrange(4, 10))) for _ in range(2 * size)]
    tokenizer = train_tokenizer([" ".join(words)], size)
    if tokenizer.vocab_size != size:
        raise SystemExit(f"the tokenizer has {tokenizer.vocab_size} tokens instead of {size}")
    return tokenizer
