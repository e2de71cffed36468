"""Experts that collapse while router statistics look healthy (report section 4.1, second).

Does an expert that is still routed to die away when the routed experts count for little beside the shared one, or when
a balance loss forces every micro-batch to be spread over all experts? A micro-batch is one row of one domain, and there
are three runs with the loss-free bias:

    healthy                 router scale 2, no balance loss
    small routed scale      router scale 0.02: the shared expert is left to do the work
    tight micro-batch loss  eq. 1 over single experts (16 groups) in every micro-batch of one row, weight 1

Two regimes: eight domains at a rate of 2e-3, with a weight decay of 1 instead of 0.1 (what does not learn shrinks over
1 / (rate * decay) steps, 500 here, which a short run would otherwise not reach; the report's run lasts several such
times); and with `--high-rate` one domain at 5e-3 and a decay of 0.1. What came out: docs/stability.md.

    python experiments/collapse.py [--high-rate] [--steps 800] [--seed 0] [--seeds 1] [--out FOLDER]

About 5 minutes a seed on one idle core. Writes collapse.json and collapse.png, or collapse_high_rate.*; curves are
means over the seeds. The last line is JSON.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from corpus import Corpus
from small_run import (
    Curves,
    arguments,
    draw_curves,
    late_means,
    run_all,
    small_model,
    small_training,
    train_small,
    write,
)
from step35.model.step35 import Step35

RUNS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "small routed scale": {"scale": 0.02},
    "tight micro-batch loss": {"weight": 1.0},
}
QUIET, BUSY = 0.1, 0.5
"""A collapsed expert: activation RMS below 0.1 of its layer's median, with at least half an even share of the load."""


REGIMES: dict[bool, dict[str, Any]] = {
    False: {"lr": 2e-3, "weight_decay": 1.0, "domains": 8},
    True: {"lr": 5e-3, "weight_decay": 0.1, "domains": 1},
}
"""Without and with `--high-rate`."""


def main() -> None:
    args = arguments(__doc__, steps=800, flags=("--high-rate",), seeds=1)
    args.out.mkdir(parents=True, exist_ok=True)
    regime, name = REGIMES[args.high_rate], "collapse_high_rate" if args.high_rate else "collapse"
    curves, findings = {}, {}
    for run_name, changes in RUNS.items():
        seeds = range(args.seed, args.seed + args.seeds)
        make = partial(run, steps=args.steps, every=args.every, **regime, **changes)
        found = list(run_all({f"{run_name}, seed {seed}": partial(make, seed=seed) for seed in seeds}).values())
        curves[run_name] = mean_curves(found)
        by_seed = [late_means(values)["collapsed_experts"] for values in found]
        findings[run_name] = late_means(curves[run_name]) | {"collapsed_by_seed": by_seed}
    draw(curves, args.out / f"{name}.png")
    write(args.out, name, {"runs": RUNS, **regime, "seed": args.seed, "seeds": args.seeds}, findings, curves)


def mean_curves(runs: list[Curves]) -> Curves:
    """Return the mean of like curves, record by record."""
    return {key: [fmean(values) for values in zip(*(run[key] for run in runs), strict=True)] for key in runs[0]}


def run(
    *, steps: int, every: int, seed: int, domains: int, scale: float = 2.0, weight: float = 0.0, **rates: float
) -> Curves:
    """Train once with this router scale and weight of the balance loss."""
    train = small_training(
        steps=steps, seed=seed, batch_rows=4, micro_rows=1, context=256, ep_groups=16, ep_weight=weight, **rates
    )
    model = small_model(moe_router_scaling_factor=scale)
    return train_small(model, train, Corpus(domains=domains, seed=seed), every=every, record=health)


def health(model: Step35, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the loss, what routing shows, and what the experts show (worst layer; busy experts)."""
    medians, busy_min, collapsed = [], [], 0
    for rms, loads in zip(figures["expert_rms"], figures["expert_load"], strict=True):
        median = sorted(rms)[(len(rms) - 1) // 2]
        medians.append(median)
        ratios = [value / median for value, load in zip(rms, loads, strict=True) if load >= BUSY / len(rms)]
        busy_min.append(min(ratios, default=1.0))
        collapsed += sum(ratio < QUIET for ratio in ratios)
    return {
        "loss": figures["loss"],
        "load_cv": figures["load_cv"],
        "dead_experts": figures["dead_experts"],
        "rms_min_to_median": min(busy_min),
        "collapsed_experts": collapsed,
        "norm_min_to_median": figures["expert_norm_min_ratio"],
        "rms_median": sum(medians) / len(medians),
    }


def draw(curves: dict[str, Curves], path: Path) -> None:
    """Draw what routing shows beside what the experts show."""
    titles = {
        "load_cv": "load of experts: std / mean",
        "rms_min_to_median": "activation RMS of busy experts, min / median",
        "rms_median": "activation RMS of the median expert",
        "loss": "loss",
    }
    draw_curves(curves, titles, path, width=16, dpi=70, log=("rms_min_to_median", "rms_median"))


if __name__ == "__main__":
    main()
