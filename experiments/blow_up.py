"""Local activation blow-up of a late expert, and what clipping does about it (report section 4.1, third; Figure 4).

A tenth of the tokens are "A", which "B" always follows. The last layer's expert that gets A has a gradient of one
constant direction, and however small that gradient becomes, Muon's update keeps its size: gate, up and down grow
along it, and the expert's output with their product. Pre-norm lets it: the final norm takes the size away again, so
that the loss stays flat. Four runs, alike but for:

    no bi-gram           the same corpus without A: how far experts grow anyway
    no clipping
    weight clipping      every 100 steps, offline rule: W <- W * tau / max |W x| where that maximum exceeds tau
    activation clipping  silu(gate) <= limit and |up| <= limit in the last layer, as the released model has it

    python experiments/blow_up.py [--steps 1500] [--seed 0] [--out FOLDER]

About 8 minutes on one idle core. Writes blow_up.json and blow_up.png; the last line is JSON.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from corpus import A, Corpus
from small_run import Curves, arguments, late_means, run_all, small_model, small_training, train_small, write
from step35.model.context import Context
from step35.model.step35 import Step35
from step35.train.weight_clipping import clip_weights, largest_products

BIGRAM_SHARE = 0.1
"""Of all tokens. Two of 16 experts are chosen, so an expert's fair share of tokens is 1/8."""
FIRST_MOE, LATE = 1, 3
"""The first and the last layer with experts."""
TAU = 10.0
"""About 1.5 times the median expert's max |W x| in the first 400 steps (6.6 gate, 6.8 up, 3.8 to 6.7 down)."""
LIMIT = 3.0
"""Limit on activations."""
CLIP_EVERY = 100
PROBE_STEP = 1_000_000
"""Number of the batch that is looked at for clipping and routing; never trained on."""

RUNS: dict[str, dict[str, float]] = {
    "no bi-gram": {"share": 0.0},
    "no clipping": {},
    "weight clipping": {"tau": TAU},
    "activation clipping": {"limit": LIMIT},
}


def main() -> None:
    args = arguments(__doc__, steps=1500)
    args.out.mkdir(parents=True, exist_ok=True)
    common = {"steps": args.steps, "every": args.every, "seed": args.seed}
    curves = run_all({name: partial(run, **common, **changes) for name, changes in RUNS.items()})
    draw(curves, args.out / "blow_up.png")
    settings = {"bigram_share": BIGRAM_SHARE, "tau": TAU, "clip_every": CLIP_EVERY, "limit": LIMIT, "layer": LATE}
    write(args.out, "blow_up", settings, {name: summary(run_curves) for name, run_curves in curves.items()}, curves)


def run(
    *, steps: int, every: int, seed: int, share: float = BIGRAM_SHARE, tau: float | None = None, limit: float = 0.0
) -> Curves:
    """Train once; `tau` clips weights, `limit` activations of the last layer (0 is off)."""
    corpus = Corpus(bigram_share=share, seed=seed)
    probe = corpus.batch(PROBE_STEP, 8, 128)

    def clip(model: Step35, step: int) -> None:
        if tau is not None and step % CLIP_EVERY == 0:
            clip_weights(model, largest_products(model, [probe]), tau)

    def record(model: Step35, figures: dict[str, Any]) -> dict[str, Any]:
        return late_expert(figures) | {"bigram_tokens": tokens_of_bigram(model, probe, figures)}

    model = small_model(clips={LATE: limit})
    train = small_training(steps=steps, seed=seed)
    return train_small(model, train, corpus, every=every, record=record, after=clip)


def late_expert(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the loss and, of the last layer, figures of its loudest and its median expert (idle ones left out)."""
    outputs = sorted(value for value in figures["expert_output"][-1] if value > 0)
    norms = figures["expert_up_norm"][-1]
    return {
        "loss": figures["loss"],
        "max": outputs[-1],
        "median": outputs[(len(outputs) - 1) // 2],
        "weight_ratio": max(norms) / sorted(norms)[(len(norms) - 1) // 2],
        "clip_share": figures.get(f"clip_share.layer_{LATE}", 0.0),
    }


@torch.no_grad()
def tokens_of_bigram(model: Step35, batch: Any, figures: dict[str, Any]) -> float:
    """Return which share of the tokens that the last layer's loudest expert gets are A (0 without any token)."""
    loudest = max(enumerate(figures["expert_output"][-1]), key=lambda pair: pair[1])[0]
    tokens, segments = torch.as_tensor(batch.tokens), torch.as_tensor(batch.segments)
    context = Context.packed(tokens, segments, record=True)
    model.trunk(tokens, context)
    routing = (context.routing or [])[-1]
    mine = tokens.flatten()[(routing.experts_NK == loudest).any(1)]
    return float((mine == A).float().mean()) if len(mine) else 0.0


def summary(curves: Curves) -> dict[str, float]:
    """Return the means over the last third of a run, and its peak."""
    ratio = [high / middle for high, middle in zip(curves["max"], curves["median"], strict=True)]
    means = late_means({**curves, "max_to_median": ratio})
    return {**means, "peak_max": max(curves["max"])}


def draw(curves: dict[str, Curves], path: Path) -> None:
    """Draw the loudest and the median expert, the loss, and the ratio of weight norms."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for colour, (name, values) in zip(("tab:gray", "tab:red", "tab:orange", "tab:blue"), curves.items(), strict=True):
        axes[0].plot(values["step"], values["max"], color=colour, label=name)
        axes[0].plot(values["step"], values["median"], ":", color=colour)
        axes[1].plot(values["step"], values["loss"], color=colour, label=name)
        axes[2].plot(values["step"], values["weight_ratio"], color=colour, label=name)
    axes[0].set(yscale="log", xlabel="step", title="expert output norm (median dotted)")
    axes[1].set(xlabel="step", ylim=(1.8, 2.4), title="loss")
    axes[2].set(xlabel="step", title="norm of up projections, max / median")
    axes[0].legend(fontsize=7)
    figure.suptitle("last layer, 16 experts")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
