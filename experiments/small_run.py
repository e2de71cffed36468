"""A training run small enough for minutes on one thread, the curves that are kept of it, and the results file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from corpus import Corpus
from step35.config.layouts import s3f1
from step35.config.model import ModelConfig
from step35.config.train import TrainConfig
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.runtime.machine import environment
from step35.train.step import Learner

Curves = dict[str, list[Any]]
"""A list for every figure, one entry for every recorded step."""


def small_model(**changes: Any) -> ModelConfig:
    """Return 4 layers of width 64, of which 1 to 3 have 16 experts, 2 of them chosen (423,584 parameters)."""
    sizes: dict[str, Any] = {
        "layers": 4, "dense": 1, "mtp": 0, "heads": 2, "sliding_heads": 2, "groups": 1, "head_dim": 32,
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "sliding_window": 32,
        "moe_num_experts": 16, "moe_top_k": 2, "moe_intermediate_size": 32, "share_expert_dim": 32,
        "moe_router_scaling_factor": 2.0, "max_position_embeddings": 4096,
    }  # fmt: skip
    return s3f1(**{**sizes, **changes})


def small_training(**changes: Any) -> TrainConfig:
    """Return 1,024 tokens a step, in fp32, by Muon at a constant rate, with the loss-free bias and no balance loss."""
    settings: dict[str, Any] = {
        "batch_rows": 8, "micro_rows": 8, "context": 128, "lr": 5e-3, "decay": "constant", "dtype": "float32",
        "mtp_weight": 0.0, "ep_weight": 0.0, "balance_rate": 1e-3,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def train_small(
    model: ModelConfig,
    train: TrainConfig,
    corpus: Corpus,
    *,
    every: int,
    record: Callable[[Step35, dict[str, Any]], dict[str, Any]],
    after: Callable[[Step35, int], None] | None = None,
) -> Curves:
    """Train from scratch; return what `record` takes from the model and the figures of every `every`-th step.

    The figures are the step's metrics and panels; `loss` is the mean since the record before. `after` may change the
    model after each update, given the updates made. The curves have `step` as well.
    """
    network = Step35(model)
    initialise(network, torch.Generator().manual_seed(train.seed))
    learner = Learner(network, train)
    curves: Curves = {}
    losses: list[float] = []
    for step in range(1, train.steps + 1):
        metrics = learner.update(corpus.batch(step, train.batch_rows, train.context), step - 1)
        losses.append(metrics["loss"])
        if after is not None:
            after(network, step)
        if step % every == 0:
            figures = {**metrics, **learner.details(), "loss": sum(losses) / len(losses)}
            for key, value in {"step": step, **record(network, figures)}.items():
                curves.setdefault(key, []).append(value)
            losses.clear()
    return curves


def arguments(
    description: str | None, *, steps: int, flags: tuple[str, ...] = (), seeds: int | None = None
) -> argparse.Namespace:
    """Read `--steps`, `--every`, `--seed`, `--out` and the script's own flags; set one thread, for like runs.

    With `seeds`, `--seeds` as well.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="updates of each run")
    parser.add_argument("--every", type=int, default=10, help="updates between records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds, help="runs with seeds from --seed on")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    torch.set_num_threads(1)
    return parser.parse_args()


def run_all(runs: dict[str, Callable[[], Curves]]) -> dict[str, Curves]:
    """Make the runs one after the other, saying how long each took."""
    curves = {}
    for name, run in runs.items():
        started = time.perf_counter()
        curves[name] = run()
        print(f"{name}: loss {curves[name]['loss'][-1]:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return curves


def late_means(curves: Curves) -> dict[str, float]:
    """Return the mean of every figure over the last third of a run."""
    last = slice(len(curves["step"]) * 2 // 3, None)
    return {key: sum(values[last]) / len(values[last]) for key, values in curves.items() if key != "step"}


def draw_curves(
    curves: dict[str, Curves], titles: dict[str, str], path: Path, *, width: float, dpi: int, log: tuple[str, ...] = ()
) -> None:
    """Draw the figures that `titles` names over the steps, one panel each, one curve a run; `log` is scaled so."""
    figure, axes = plt.subplots(1, len(titles), figsize=(width, 4), layout="constrained")
    for name, values in curves.items():
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            axis.plot(values["step"], values[key], label=name)
            axis.set(xlabel="step", title=title, yscale="log" if key in log else "linear")
    axes[0].legend()
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def write(out: Path, name: str, settings: dict[str, Any], findings: dict[str, Any], curves: dict[str, Curves]) -> None:
    """Write `out`/`name`.json and print the findings as the last line."""
    result = {
        "command": " ".join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "environment": environment(),
        "settings": settings,
        "findings": findings,
        "curves": curves,
    }
    text = json.dumps(rounded(result), indent=1)
    (out / f"{name}.json").write_text(text + "\n")
    print(json.dumps(rounded(findings)))


def rounded(value: Any) -> Any:
    """Return `value` with every float in it at 4 significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
