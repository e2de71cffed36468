"""A checkpoint too small to say anything, and one whole demo in seconds, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest
import torch

from step35.agents.synth.arithmetic import demonstration
from step35.agents.tools.calculator import Calculator
from step35.cli.stages import publish
from step35.config.presets import s3f1
from step35.data import chat
from step35.data.arithmetic import problem
from step35.data.tokenizer import train_tokenizer
from step35.model.init import initialise
from step35.model.step35 import Step35

MICRO: dict[str, dict[str, Any]] = {
    "prepare": {"vocab-size": 600, "corpus-chars": 300_000, "val-tokens": 2048},
    "train": {
        "steps": 6, "context": 64, "batch-rows": 2, "micro-rows": 2, "checkpoint-every": 2, "validate-every": 3,
        "monitor-every": 3, "dtype": "float32",
    },
    "sft": {
        "steps": 6, "context": 768, "batch-rows": 1, "micro-rows": 1, "checkpoint-every": 1, "conversations": 12,
        "mtp-joint-from": 2, "dtype": "float32",
    },
    "rl": {
        "steps": 2, "prompts": 2, "responses": 1, "max-turns": 1, "max-turn-tokens": 8, "actor-batches": 1,
        "critic-batches": 1, "checkpoint-every": 1,
    },
    "eval": {"problems": 4, "samples": 1, "speed-prompts": 1, "max-turns": 1, "max-turn-tokens": 8},
}  # fmt: skip
"""The demo's stages, just large enough to be stopped halfway. The dtype is given because "auto" is measured anew in
each process, and may come out differently."""

DEMO = [
    part
    for stage, settings in MICRO.items()
    for name, value in settings.items()
    for part in (f"--{stage}.{name}", str(value))
]


class Demo(NamedTuple):
    """A finished demo."""

    path: Path
    code: int
    output: str
    summary: dict[str, Any]
    """The content of summary.json right after the run."""


def start(*arguments: str, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start `step35` with `arguments` in a process of its own, on one thread, so that it can be repeated exactly."""
    return subprocess.Popen(
        [sys.executable, "-m", "step35.cli.main", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=output or subprocess.DEVNULL,
        stderr=subprocess.STDOUT if output else subprocess.DEVNULL,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Poll `condition`; fail when the process ends before it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended with {process.returncode} before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Process(NamedTuple):
    """How tests start, watch and set up commands (a fixture, as test files cannot import each other)."""

    start: Callable[..., subprocess.Popen[bytes]]
    wait_until: Callable[..., None]
    demo_flags: list[str]


@pytest.fixture(scope="session")
def process() -> Process:
    return Process(start, wait_until, DEMO)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, run once from beginning to end. Tests must leave its models as they are."""
    path = tmp_path_factory.mktemp("demo") / "run"
    log = path.with_name("output.txt")
    with open(log, "wb") as output:
        code = start("demo", "--out", str(path), *DEMO, output=output).wait(timeout=600)
    text = log.read_text(encoding="utf-8", errors="replace")
    summary = path / "summary.json"
    return Demo(path, code, text, json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {})


@pytest.fixture(scope="session")
def micro_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of every part of the architecture with a tokenizer, as a stage publishes it."""
    calculator = Calculator()
    problems = [problem(i, split="train", seed=0) for i in range(40)]
    tokenizer = train_tokenizer([chat.render(demonstration(p, calculator), [calculator.schema]) for p in problems], 400)
    config = s3f1(
        layers=5, dense=1, mtp=2, heads=2, sliding_heads=4, groups=2, head_dim=16,
        clips={3: 0.5}, clips_shared={4: 0.5},
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, sliding_window=8,
        moe_num_experts=4, moe_top_k=2, moe_intermediate_size=24, share_expert_dim=16,
        moe_router_scaling_factor=2.0, max_position_embeddings=1024, eos_token_id=(1, 3),
    )  # fmt: skip
    model = Step35(config)
    initialise(model, torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("checkpoint") / "micro"
    publish(model, tokenizer, folder)
    return folder
