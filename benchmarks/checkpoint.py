"""What saving costs a training step, written while it waits and in the background, and how fast files come and go.

A round is `--steps` updates with one checkpoint begun before the first of them. Rounds without a checkpoint, with one
that training waits for, and with one in the background take turns; the fastest round of each kind counts.

    python benchmarks/checkpoint.py [--preset mini] [--steps 8] [--rounds 3] [--folder FOLDER] [--out FILE]

The last line is JSON with the named ratios. On a machine that does other work the figures are only indicative.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from step35.config.checkpoint import CheckpointConfig
from step35.config.presets import preset
from step35.config.train import TrainConfig
from step35.data.packing import Batch
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.device import reuse_memory, set_threads
from step35.runtime.machine import environment
from step35.runtime.manifest import read_manifest, verify
from step35.runtime.rundir import RunDir
from step35.runtime.saver import Saver
from step35.runtime.state import take_apart
from step35.train.step import Learner

RESULTS = Path(__file__).parent / "results"
KINDS = ("none", "waiting", "background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8, help="updates of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/checkpoint-PRESET.json")
    args = parser.parse_args()
    threads = set_threads()
    reuse_memory()
    update, state = make_update(args.preset, args.rows, args.context)
    size = sum(tensor.nbytes for tensor in take_apart(state())[1].values())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rounds = [
            {kind: play(kind, update, state, args.steps, Path(folder)) for kind in KINDS} for _ in range(args.rounds)
        ]
        speeds = {name: size / seconds / 1e9 for name, seconds in transfer(state(), Path(folder)).items()}
    ratios = summary(rounds, args.steps) | {f"{name}_gb_per_s": round(speed, 2) for name, speed in speeds.items()}
    result = {
        "command": " ".join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]),
        "environment": environment() | {"threads": threads, "load_average": os.getloadavg()},
        "preset": args.preset, "state_bytes": size, "rounds": rounds, "ratios": ratios,
    }  # fmt: skip
    show(ratios, size)
    out = args.out or RESULTS / f"checkpoint-{args.preset}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(ratios))


def make_update(name: str, rows: int, context: int) -> tuple[Callable[[], object], Callable[[], dict[str, Any]]]:
    """Return a function that makes one update on random tokens, and one that returns the state."""
    model = Step35(preset(name))
    initialise(model, torch.Generator().manual_seed(0))
    learner = Learner(model, TrainConfig(steps=10**6, batch_rows=rows, micro_rows=rows, context=context))
    tokens = np.random.default_rng(0).integers(16, model.config.vocab_size, (rows, context))
    batch = Batch(tokens, np.zeros_like(tokens), np.ones_like(tokens, dtype=bool))
    learner.update(batch, 0)  # the optimisers' state exists from here on
    return lambda: learner.update(batch, 1), lambda: {"step": 1, **learner.state_dict()}


def play(
    kind: str, update: Callable[[], object], state: Callable[[], dict[str, Any]], steps: int, folder: Path
) -> dict[str, float]:
    """Return the seconds of a round, and of the call in it that saves."""
    config = CheckpointConfig(keep=1, background=kind == "background")
    with Saver(RunDir(folder), config, Console()) as saver:
        if kind == "background":
            saver.save(1, state())  # as in a long run, the memory of the copy is there already
            saver.wait()
        started = time.perf_counter()
        if kind != "none":
            saver.save(1, state())
        called = time.perf_counter()
        for _ in range(steps):
            update()
        updated = time.perf_counter()
        saver.wait()
        ended = time.perf_counter()
    return {"seconds": ended - started, "call": called - started, "late": ended - updated}


def transfer(state: dict[str, Any], folder: Path) -> dict[str, float]:
    """Return the seconds of writing a checkpoint, checking its files and loading it."""
    start = time.perf_counter()
    path = checkpoint.save(folder / "transfer", 1, state)
    written = time.perf_counter()
    verify(path, read_manifest(path))
    verified = time.perf_counter()
    checkpoint.load(path)
    return {"write": written - start, "verify": verified - written, "load": time.perf_counter() - verified}


def summary(rounds: list[dict[str, dict[str, float]]], steps: int) -> dict[str, float]:
    """Return what one checkpoint adds to a round, in steps and in seconds, waiting and in the background."""
    best = {kind: min(r[kind]["seconds"] for r in rounds) for kind in KINDS}
    call = {kind: min(r[kind]["call"] for r in rounds) for kind in KINDS}
    step = best["none"] / steps
    added = {kind: best[kind] - best["none"] for kind in KINDS[1:]}
    return {
        "step_s": round(step, 3),
        "waiting_call_s": round(call["waiting"], 3),
        "background_call_s": round(call["background"], 3),
        "call_ratio": round(call["waiting"] / call["background"], 1),
        "waiting_added_steps": round(added["waiting"] / step, 3),
        "background_added_steps": round(added["background"] / step, 3),
    }


def show(ratios: dict[str, float], size: int) -> None:
    """Print the table."""
    Console().table(f"saving {size / 1e6:,.0f} MB", ["figure", "value"], list(ratios.items()))


if __name__ == "__main__":
    main()
