"""What the monitors cost: the share of a training step, found in two ways on the same model and batches.

inside: time spent within the monitors' own functions over the time of the steps; other processes slow both alike.
alternation: steps with and without monitors in turn, 1 - median without / median with; wants an idle machine.

    python benchmarks/monitors.py [--preset tiny] [--rows 16] [--micro-rows 16] [--context 256] [--steps 20]

The last line is JSON with the shares. Details (panels, norms by class; every `monitor_every` steps) are timed apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from step35.config.presets import preset
from step35.config.stability import StabilityConfig
from step35.config.train import TrainConfig
from step35.data.packing import Batch
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.runtime.device import reuse_memory, set_threads
from step35.runtime.machine import environment
from step35.train.monitors.monitor import Monitor
from step35.train.monitors.observation import Observation
from step35.train.step import Learner

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "experts": (Observation, "experts"),
    "dense": (Observation, "dense"),
    "attention": (Observation, "attention"),
    "micro_batch": (Monitor, "micro_batch"),
    "before_update": (Monitor, "before_update"),
    "sample": (Monitor, "sample"),
    "after_update": (Monitor, "after_update"),
}


class Stopwatch:
    """Seconds spent in some functions; they do not call each other."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def install(self) -> None:
        """Time every call of the parts from now on."""
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any, **named: Any) -> Any:
            started = now()
            result = function(*values, **named)
            self.seconds[part] += now() - started
            return result

        return timed


def now() -> float:
    """Return the time once the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def learner(name: str, config: TrainConfig, stability: StabilityConfig) -> Learner:
    """Return a fresh learner."""
    model = Step35(preset(name))
    initialise(model, torch.Generator().manual_seed(0))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Learner(model, config.model_copy(update={"stability": stability}))


def batch(config: TrainConfig, vocabulary: int, seed: int) -> Batch:
    """Return random rows of four documents each."""
    random = np.random.default_rng(seed)
    shape = (config.batch_rows, config.context)
    segments = np.broadcast_to(np.arange(config.context) * 4 // config.context, shape).astype(np.int32)
    targets = np.ones(shape, dtype=bool)
    targets[:, 1:] = segments[:, 1:] == segments[:, :-1]
    return Batch(random.integers(0, vocabulary, shape), segments, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--micro-rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind; the first is not counted")
    parser.add_argument("--per-micro-batch", action="store_true", help="figures of every micro-batch are logged too")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/monitors-PRESET.json")
    args = parser.parse_args()
    threads = set_threads()
    reuse_memory()
    config = TrainConfig(batch_rows=args.rows, micro_rows=args.micro_rows, context=args.context, dtype=args.dtype)
    watching, blind = (
        learner(args.preset, config, StabilityConfig(monitors=on, per_micro_batch=on and args.per_micro_batch))
        for on in (True, False)
    )
    watch = Stopwatch()
    times: dict[str, list[float]] = {"on": [], "off": [], "inside": [], "details": []}
    for step in range(args.steps):
        rows = batch(config, watching.model.config.vocab_size, step)
        if step == 1:
            watch.install()
        losses = set()
        for kind, subject in (("on", watching), ("off", blind)) if step % 2 else (("off", blind), ("on", watching)):
            before, started = sum(watch.seconds.values()), now()
            losses.add(subject.update(rows, step)["loss"])
            times[kind].append(now() - started)
            if kind == "on":
                times["inside"].append((sum(watch.seconds.values()) - before) / times["on"][-1])
        assert len(losses) == 1, f"step {step}: monitors changed the loss: {losses}"
        started = now()
        watching.details()
        times["details"].append(now() - started)
    counted = {kind: statistics.median(values[1:]) for kind, values in times.items()}
    shares = {
        "preset": args.preset,
        "inside": round(counted["inside"], 4),
        "alternation": round(1 - counted["off"] / counted["on"], 4),
        "details_of_a_step": round(counted["details"] / counted["on"], 4),
        **{part: round(s / sum(times["on"][1:]), 4) for part, s in watch.seconds.items()},
    }
    result = {
        "command": " ".join(["python", "benchmarks/monitors.py", *sys.argv[1:]]),
        "environment": environment() | {"threads": threads},
        "seconds": counted,
        "shares": shares,
    }
    out = args.out or RESULTS / f"monitors-{args.preset}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
