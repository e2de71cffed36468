"""Speed of whole training steps: ours beside transformers' text model with torch's optimisers, in one run.

Both start from the same weights and take the same batches, without MTP, in fp32 or bf16. Ours is `Learner.update`: Muon
with Polar Express for every hidden matrix, AdamW for the rest, load and activation statistics of the experts (and in
bf16 fp32 masters, which theirs do without). Theirs is the loss transformers computes, clipping, and
`torch.optim.Muon`, which takes 2-D matrices only, in two ways:

    experts by AdamW   what it can do as it is: the stacked experts (3-D) go to AdamW
    experts by slices  the experts' slices as parameters of their own, one after the other: about our work

Passes and updates are timed apart, in turn, the fastest of each counts; a step of N tokens is then N / (tokens of a
pass) passes and one update. One real step of ours with all its passes checks the sum (`whole_step_over_sum`).

    python benchmarks/train.py [--presets tiny mini] [--dtype bfloat16] [--length 4096] [--seconds 60]

Rows have 4,096 tokens unless asked otherwise, as in the report's first stages (section 4.2).

Wants an idle machine. The last line is JSON with the ratios; each preset's result file holds everything.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from model import RESULTS, load_transformers, matmul_peak
from step35.config.cost import cost
from step35.config.presets import preset
from step35.config.train import TrainConfig
from step35.data.packing import Batch
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.runtime.device import reuse_memory, set_threads
from step35.runtime.machine import environment
from step35.train.step import Learner

LR = 1e-4
"""Small, so that the weights, and with them the routing, stay what they were."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "mini"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--pass-tokens", type=int, default=4096, help="tokens of a forward and backward pass")
    parser.add_argument("--step-tokens", type=int, default=65536, help="tokens of a step")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on each preset's measurements")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    threads = set_threads()
    reuse_memory()  # as every training verb does; theirs gains as well
    peak = matmul_peak(getattr(torch, args.dtype))
    # Before the first result file is written, which would count as an edit.
    machine = environment() | {"threads": threads, "transformers": transformers.__version__}
    ratios = {}
    for name in args.presets:
        row = measure(name, args, peak)
        ratios |= {f"{name}_{key}": round(row[key], 3) for key in NAMED}
        result = {
            "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]),
            "environment": machine,
            "preset": name, "dtype": args.dtype, "length": args.length,
            "pass_tokens": args.pass_tokens, "step_tokens": args.step_tokens,
            "matmul_peak_flops": peak, "figures": row,
        }  # fmt: skip
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"train-{name}-{args.dtype}-{args.length}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    print(json.dumps(ratios))


NAMED = ("ratio", "ratio_slices", "optimiser_share", "share_of_peak", "whole_step_over_sum")


class Stopwatch:
    """Wraps a function and adds up the seconds spent in it."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work, self.seconds = work, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = self.work(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        return result


class Ours:
    """Our trainer."""

    def __init__(self, model: Step35, dtype: str, length: int, pass_rows: int) -> None:
        config = TrainConfig(
            context=length, batch_rows=pass_rows, micro_rows=pass_rows, lr=LR, final_lr=LR, warmup_steps=0,
            mtp_weight=0.0, dtype=dtype, param_dtype=dtype, balance_rate=0.0,
        )  # fmt: skip
        self.learner = Learner(model, config)
        self.updating = self.learner.apply = Stopwatch(self.learner.apply)

    def step(self, tokens: Tensor) -> tuple[float, float, float]:
        """Take a step on tokens (rows, length); return the loss and the seconds of its passes and of the update."""
        before, started = self.updating.seconds, time.perf_counter()
        batch = Batch(tokens.numpy(), np.zeros(tokens.shape, np.int32), np.ones(tokens.shape, bool))
        loss = float(self.learner.update(batch, 0)["loss"])
        update = self.updating.seconds - before
        return loss, time.perf_counter() - started - update, update


class Theirs:
    """transformers' model with torch's optimisers."""

    def __init__(self, model: nn.Module, *, slices: bool) -> None:
        self.model = model
        named = {name: p for name, p in model.named_parameters() if "language_model" in name or "lm_head" in name}
        others = ("embed_tokens", "lm_head", "g_proj", "mlp.gate.weight")  # as ours: AdamW for these, and vectors
        hidden = {name for name, p in named.items() if p.ndim > 1 and not any(mark in name for mark in others)}
        self.stacked = [named[name] for name in hidden if named[name].ndim == 3] if slices else []
        self.slices = [[nn.Parameter(matrix) for matrix in p.detach().unbind()] for p in self.stacked]
        matrices = [named[name] for name in hidden if named[name].ndim == 2]
        matrices += [matrix for parts in self.slices for matrix in parts]
        taken = {id(p) for p in [*matrices, *self.stacked]}
        rest = [p for p in named.values() if id(p) not in taken]
        self.optimisers = [
            torch.optim.Muon(matrices, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
        ]

    def step(self, tokens: Tensor) -> tuple[float, float, float]:
        """Take a step; return what `Ours.step` does."""
        started = time.perf_counter()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        passed = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for stacked, parts in zip(self.stacked, self.slices, strict=True):
            for part, gradient in zip(parts, stacked.grad.unbind(), strict=True):
                part.grad = gradient
        for optimiser in self.optimisers:
            optimiser.step()
        self.model.zero_grad(set_to_none=True)
        return loss.item(), passed - started, time.perf_counter() - passed


def measure(name: str, args: argparse.Namespace, peak: float) -> dict[str, float]:
    """Return the figures of one preset."""
    model = Step35(preset(name).with_mtp(0))
    initialise(model, torch.Generator().manual_seed(0))
    twins = [load_transformers(model).to(getattr(torch, args.dtype)) for _ in range(2)]
    rows = args.pass_tokens // args.length
    systems = [
        Ours(model, args.dtype, args.length, rows),
        Theirs(twins[0], slices=False),
        Theirs(twins[1], slices=True),
    ]
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        16, model.config.vocab_size, (args.step_tokens // args.length, args.length), generator=random
    )
    losses, passes, updates = alternate(systems, tokens[:rows], args.seconds)
    if max(losses) - min(losses) > (1e-3 if args.dtype == "float32" else 5e-2):
        raise SystemExit(f"the first losses differ: {losses}; the systems do not train the same model.")
    count = args.step_tokens / args.pass_tokens
    steps = [count * run + update for run, update in zip(passes, updates, strict=True)]
    _, run, update = systems[0].step(tokens)
    ours, theirs, slices = steps
    flops = 3 * cost(model.config, args.length).prefill_flops * args.step_tokens
    return {
        "tokens_per_s": args.step_tokens / ours,
        "tokens_per_s_transformers": args.step_tokens / theirs,
        "tokens_per_s_transformers_slices": args.step_tokens / slices,
        "ratio": theirs / ours,
        "ratio_slices": slices / ours,
        "ratio_passes": passes[1] / passes[0],
        "share_of_peak": flops / ours / peak,
        "share_of_peak_transformers": flops / theirs / peak,
        "optimiser_share": updates[0] / ours,
        "optimiser_share_transformers": updates[1] / theirs,
        "optimiser_share_transformers_slices": updates[2] / slices,
        "pass_s": passes[0],
        "pass_s_transformers": passes[1],
        "update_s": updates[0],
        "update_s_transformers": updates[1],
        "update_s_transformers_slices": updates[2],
        "whole_step_over_sum": (run + update) / ours,
        "first_loss_difference": max(losses) - min(losses),
    }


def alternate(
    systems: Sequence[Ours | Theirs], tokens: Tensor, seconds: float
) -> tuple[list[float], list[float], list[float]]:
    """Run the systems in turn, twice at least; return each one's first loss and least seconds of pass and update."""
    losses: list[float] = []
    passes, updates = [math.inf] * len(systems), [math.inf] * len(systems)
    began, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - began < seconds:
        for i, system in enumerate(systems):
            loss, run, update = system.step(tokens)
            passes[i], updates[i] = min(passes[i], run), min(updates[i], update)
            losses += [loss] if rounds == 0 else []
        rounds += 1
    return losses, passes, updates


if __name__ == "__main__":
    main()
