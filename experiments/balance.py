"""Load balance with and without the loss-free bias and the EP-group loss (report section 2, eq. 1).

Rows come from eight domains of unequal frequency, and tokens are unequal as well, so that a router left to itself is
uneven. Four runs with the report's rates (bias 0.001 a step, weight of the EP loss 0.001) on four groups of four
experts:

    none       neither
    bias       an expert's selection bias goes up when its load is under the mean, down when over
    EP loss    G * sum_g f_g p_g for each micro-batch: it evens out groups, not the experts within one
    both       as in the report

    python experiments/balance.py [--steps 1000] [--seed 0] [--out FOLDER]

About 6 minutes on one core. Writes balance.json and balance.png; the last line is JSON.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
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

RATE, WEIGHT, GROUPS = 1e-3, 1e-3, 4
RUNS = {"none": (0.0, 0.0), "bias": (RATE, 0.0), "EP loss": (0.0, WEIGHT), "both": (RATE, WEIGHT)}
"""Balance rate and weight of the EP loss."""


def main() -> None:
    args = arguments(__doc__, steps=1000)
    args.out.mkdir(parents=True, exist_ok=True)
    common = {"steps": args.steps, "every": args.every, "seed": args.seed}
    curves = run_all({name: partial(run, rate, weight, **common) for name, (rate, weight) in RUNS.items()})
    draw(curves, args.out / "balance.png")
    settings = {"runs": RUNS, "ep_groups": GROUPS}
    write(args.out, "balance", settings, {name: late_means(values) for name, values in curves.items()}, curves)


def run(rate: float, weight: float, *, steps: int, every: int, seed: int) -> Curves:
    """Train once."""
    train = small_training(
        steps=steps, seed=seed, lr=2e-3, balance_rate=rate, ep_weight=weight, ep_groups=GROUPS, micro_rows=4
    )
    return train_small(small_model(), train, Corpus(domains=8, seed=seed), every=every, record=load)


def load(model: Step35, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the loss, the spread of load over experts, and the busiest group's load (1 is even), mean over layers."""
    busiest = [GROUPS * max(groups) for groups in figures["group_load"]]
    return {
        "loss": figures["loss"],
        "load_cv": figures["load_cv"],
        "group_load_max": sum(busiest) / len(busiest),
        "dead_share": figures["dead_share"],
    }


def draw(curves: dict[str, Curves], path: Path) -> None:
    """Draw the three curves of every run."""
    titles = {
        "load_cv": "load of experts: std / mean",
        "group_load_max": "load of the busiest EP group / mean",
        "loss": "loss",
    }
    draw_curves(curves, titles, path, width=13, dpi=80)


if __name__ == "__main__":
    main()
