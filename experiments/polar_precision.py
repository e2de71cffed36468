"""Does Polar Express need fp16? Its intermediates in bf16, fp16 and fp32 on hard updates (report section 4.1, first).

The report saw rare extreme outliers of the iteration in bf16, blamed accumulated addition error, and moved the
iteration to fp16. Here six families of hard matrices, and the momenta of a real short run, go through the same six
polynomials under three kinds of arithmetic (only the rounding differs, products are exact to fp32 otherwise):

    product   the result of each product is rounded once (ours, and what tensor cores do)
    operation every elementary operation is rounded (the published code, run op by op)
    sums      as `operation`, and the sums inside a product are rounded after every 32 terms

Measured against the same iteration in fp64, and against exact SVD: the largest singular value and entry after any step,
how far singular values end from 1, the error of the update; the safety factor below which an arithmetic explodes; and
the products needed for a given error beside Newton-Schulz as in `torch.optim.Muon`.

    python experiments/polar_precision.py [--matrices 100] [--steps 40] [--out FOLDER]

About 3 minutes on one core. Writes polar_precision.json and polar_precision.png; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from step35.config.presets import tiny
from step35.config.train import MuonConfig, TrainConfig
from step35.data.packing import Row, stack
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.runtime.machine import environment
from step35.train.minimax import minimax_chain
from step35.train.polar import SAFETY, SMALLEST, polar_express
from step35.train.step import Learner

ROWS, COLUMNS, STEPS = 128, 256, 6
FACTORS = (1.0, 1.001, 1.002, 1.005, 1.01, 1.02)
"""Safety factors to try; the iteration's own is 1.01."""
CHUNK = 32
"""Terms that the arithmetic `sums` adds before it rounds."""
ARITHMETICS = [
    (dtype, style) for style in ("product", "operation", "sums") for dtype in ("float32", "float16", "bfloat16")
]
COLOURS = {"float64": "black", "float32": "tab:green", "float16": "tab:blue", "bfloat16": "tab:red"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=100, help="of each family")
    parser.add_argument("--steps", type=int, default=40, help="training steps before momenta are taken")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    families = {name: [make(args.matrices)] for name, make in FAMILIES.items()}
    families["real momentum"] = momenta(args.steps)
    precision = {name: measure(batches) for name, batches in families.items()}
    margin = explosions([batch for batches in families.values() for batch in batches])
    cost = {name: convergence(families[name]) for name in ("gaussian", "real momentum")}
    args.out.mkdir(parents=True, exist_ok=True)
    figure(precision, margin, cost, args.out / "polar_precision.png")
    findings = summary(precision, margin, cost)
    result = {
        "command": " ".join(["python", "experiments/polar_precision.py", *sys.argv[1:]]),
        "environment": environment(),
        "matrices": {name: sum(map(len, batches)) for name, batches in families.items()},
        "precision": {
            family: {key: {k: v for k, v in values.items() if k != "values"} for key, values in rows.items()}
            for family, rows in precision.items()
        },
        "largest_singular_value_by_safety_factor": margin,
        "cost": cost,
        "findings": findings,
    }
    (args.out / "polar_precision.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(findings))


def gaussian(count: int) -> Tensor:
    return torch.randn(count, ROWS, COLUMNS)


def spectrum(count: int, values: Tensor) -> Tensor:
    """Return matrices with these singular values and random directions."""
    u, v = (torch.linalg.qr(torch.randn(count, size, len(values)))[0] for size in (ROWS, COLUMNS))
    return (u * values) @ v.mT


def near_duplicates(count: int) -> Tensor:
    """Four different rows, each repeated with a relative difference of 1e-3."""
    rows = torch.randn(count, 4, COLUMNS).repeat(1, ROWS // 4, 1)
    return rows + 1e-3 * gaussian(count)


FAMILIES: dict[str, Callable[[int], Tensor]] = {
    "gaussian": gaussian,
    "rank 8": lambda n: torch.randn(n, ROWS, 8) @ torch.randn(n, 8, COLUMNS),
    "heavy-tailed": lambda n: gaussian(n) / torch.randn(n, ROWS, COLUMNS),  # Cauchy: no mean, no variance
    "one dominates": lambda n: gaussian(n) + 1e4 * torch.randn(n, ROWS, 1) @ torch.randn(n, 1, COLUMNS) / COLUMNS,
    "near-duplicate rows": near_duplicates,
    "decaying": lambda n: spectrum(n, torch.logspace(0, -6, ROWS)),
    "all at the edge": lambda n: spectrum(n, torch.ones(ROWS)),
}


def momenta(steps: int) -> list[Tensor]:
    """Train `tiny` on bytes of the standard library's sources; return its momenta, one batch a shape."""
    model = Step35(tiny(vocab_size=256).with_mtp(0))
    initialise(model, torch.Generator().manual_seed(0))
    muon = MuonConfig(iteration_dtype="float32")
    config = TrainConfig(steps=steps, batch_rows=8, micro_rows=8, mtp_weight=0.0, dtype="float32", optim=muon)
    learner = Learner(model, config)
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60])
    for step in range(steps):
        rows = np.frombuffer(text, np.uint8, 8 * 256, offset=step * 8 * 256).reshape(8, 256).astype(np.int64)
        segments, targets = np.zeros(256, np.int32), np.ones(256, bool)
        loss = learner.update(stack([Row(row, segments, targets) for row in rows]), step)["loss"]
    print(f"trained {steps} steps of tiny, loss {loss:.2f}")
    by_shape: dict[torch.Size, list[Tensor]] = {}
    optimiser: Any = learner.optimisers[0]
    for entry in optimiser.matrices:
        for matrix in entry.split(optimiser.state[entry.parameter]["momentum"]):
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
            by_shape.setdefault(wide.shape, []).append(wide)
    return [torch.stack(matrices) for matrices in by_shape.values()]


def iterate(x: Tensor, dtype: torch.dtype, style: str, safety: float = SAFETY) -> Iterator[tuple[Tensor, float]]:
    """Yield the state after each step (fp32 or fp64) and the largest entry of the step's intermediates."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype).to(wide)

    def each(value: Tensor) -> Tensor:
        return value if style == "product" else rounded(value)

    def product(a: Tensor, b: Tensor) -> Tensor:
        if style != "sums":
            return each(a @ b)
        total = torch.zeros(())
        for left, right in zip(a.split(CHUNK, -1), b.split(CHUNK, -2), strict=True):
            total = rounded(total + left @ right)
        return total

    x = rounded(x.to(wide) / (safety * x.to(wide).norm(dim=(-2, -1), keepdim=True) + 1e-7))
    *early, final = minimax_chain(STEPS)
    for a, b, c in [*((a / safety, b / safety**3, c / safety**5) for a, b, c in early), final]:
        gram = rounded(product(x, x.mT))
        inner = rounded(each(b * gram) + each(c * product(gram, gram)))
        x = rounded(each(a * x) + product(inner, x))
        yield x, max(float(t.abs().max()) for t in (gram, inner, x))


def measure(batches: list[Tensor]) -> dict[str, dict[str, Any]]:
    """Return the figures of a family for each arithmetic, the worst over its matrices unless a name says mean."""
    rows = {}
    exact = [list(iterate(batch, torch.float64, "product")) for batch in batches]
    for dtype, style in [("float64", "product"), *ARITHMETICS]:
        runs = [list(iterate(batch, getattr(torch, dtype), style)) for batch in batches]
        largest = [max(float(torch.linalg.matrix_norm(run[t][0], 2).max()) for run in runs) for t in range(STEPS)]
        outlier = [
            max(run[t][1] / reference[t][1] for run, reference in zip(runs, exact, strict=True)) for t in range(STEPS)
        ]
        values = torch.cat([torch.linalg.svdvals(run[-1][0]).flatten() for run in runs])
        rows[f"{dtype}, {style}"] = {
            "largest_singular_value_by_step": [round(v, 4) for v in largest],
            "largest_entry_over_exact_by_step": [round(v, 4) for v in outlier],
            "finite": all(bool(run[-1][0].isfinite().all()) for run in runs),
            "overshoot": float(values.max()) - 1,
            "values": values.tolist(),
            **directions([run[-1][0] for run in runs], batches),
            "distance_to_exact": float(
                np.mean([distance(run[-1][0], ref[-1][0]) for run, ref in zip(runs, exact, strict=True)])
            ),
        }
    return rows


def explosions(batches: list[Tensor]) -> dict[str, dict[str, float | None]]:
    """Return the largest singular value at the end, of all matrices, by arithmetic and safety factor; None: not finite.

    Exact arithmetic ends at 1.0012.
    """
    return {
        f"{dtype}, {style}": {
            str(factor): largest([end_of(iterate(batch, getattr(torch, dtype), style, factor)) for batch in batches])
            for factor in FACTORS
        }
        for dtype, style in ARITHMETICS
    }


def end_of(steps: Iterator[tuple[Tensor, float]]) -> Tensor:
    return list(steps)[-1][0]


def largest(results: list[Tensor]) -> float | None:
    """Return the largest singular value, or None when an entry is not finite."""
    if not all(bool(result.isfinite().all()) for result in results):
        return None
    return float(f"{max(float(torch.linalg.matrix_norm(r.double(), 2).max()) for r in results):.5g}")


def directions(results: list[Tensor], batches: list[Tensor]) -> dict[str, float]:
    """Return how the directions that the polynomials are made for end, beside exact SVD.

    For singular values of at least SMALLEST times the norm: max |value - 1| and the mean relative error of the update
    in their subspace; for the others, which exact arithmetic leaves small: the largest size they reach.
    """
    off, errors, noise = 0.0, [], 0.0
    for result, batch in zip(results, batches, strict=True):
        u, s, vh = torch.linalg.svd(batch.double(), full_matrices=False)
        kept = s >= 1.01 * SMALLEST * s.norm(dim=-1, keepdim=True)
        inside = u.mT @ result.double() @ vh.mT
        eye = torch.diag_embed(kept.double())
        both = kept[:, :, None] & kept[:, None, :]
        difference = torch.where(both, inside - eye, torch.zeros_like(eye))
        errors += (difference.norm(dim=(-2, -1)) / eye.norm(dim=(-2, -1))).tolist()
        off = max(off, float(((inside.diagonal(dim1=-2, dim2=-1) - 1).abs() * kept).max()))
        lost = torch.where(kept[:, :, None] | kept[:, None, :], torch.zeros_like(inside), inside)
        noise = max(noise, float(torch.linalg.matrix_norm(lost, 2).max()))
    return {"off_one": off, "update_error_mean": float(np.mean(errors)), "outside_directions": noise}


def distance(result: Tensor, reference: Tensor) -> float:
    """Return the mean over matrices of |result - reference| / |reference|."""
    return float(((result - reference).norm(dim=(-2, -1)) / reference.norm(dim=(-2, -1))).double().mean())


def convergence(batches: list[Tensor]) -> dict[str, Any]:
    """Return the RMS of (singular value - 1) after each number of steps; every step costs three products."""
    methods: dict[str, Callable[[Tensor, int], Tensor]] = {
        "polar express": lambda g, steps: polar_express(g, steps=steps),
        "torch.optim.Muon": lambda g, steps: newton_schulz(g, steps, (3.4445, -4.7750, 2.0315)),
        "Newton-Schulz, convergent": lambda g, steps: newton_schulz(g, steps, (1.875, -1.25, 0.375)),
    }
    found: dict[str, Any] = {
        name: [rms(torch.cat([torch.linalg.svdvals(run(g, t)).flatten() for g in batches])) for t in range(1, 13)]
        for name, run in methods.items()
    }
    ours = found["polar express"]
    found["steps for the error of torch.optim.Muon's 5"] = first(ours, found["torch.optim.Muon"][4])
    found["torch.optim.Muon's best error, with any number of steps"] = min(found["torch.optim.Muon"])
    return found


def newton_schulz(gradients: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Return torch's own iteration (bf16), matrix by matrix, as it has no batches."""
    return torch.stack([_zeropower_via_newtonschulz(g, coefficients, steps, 1e-7).float() for g in gradients])


def rms(values: Tensor) -> float:
    return float((values - 1).square().mean().sqrt())


def first(errors: list[float], target: float) -> int | None:
    """Return the least number of steps whose error is at most `target`."""
    return next((t for t, error in enumerate(errors, start=1) if error <= target), None)


def summary(precision: dict[str, Any], margin: dict[str, Any], cost: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that decide: the worst case of each arithmetic over all families."""
    worst = {}
    for dtype, style in ARITHMETICS:
        rows = [family[f"{dtype}, {style}"] for family in precision.values()]
        worst[f"{dtype}, {style}"] = {
            "largest_singular_value_without_safety": margin[f"{dtype}, {style}"]["1.0"],
            "largest_entry_over_exact": max(max(row["largest_entry_over_exact_by_step"]) for row in rows),
            "overshoot_at_the_end": round(max(row["overshoot"] for row in rows), 4),
            "update_error_on_real_momentum": round(
                precision["real momentum"][f"{dtype}, {style}"]["update_error_mean"], 5
            ),
        }
    steps = {name: row["steps for the error of torch.optim.Muon's 5"] for name, row in cost.items()}
    return {"worst": worst, "steps_for_the_error_of_torch_muon_with_5": steps}


def figure(precision: dict[str, Any], margin: dict[str, Any], cost: dict[str, Any], path: Path) -> None:
    """Draw the four panels."""
    _, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    marks = {"product": "-", "operation": "--", "sums": ":"}
    for dtype, style in ARITHMETICS:
        heights = [1e9 if v is None else min(v, 1e9) for v in margin[f"{dtype}, {style}"].values()]
        axes[0, 0].plot(FACTORS, heights, marks[style], marker=".", color=COLOURS[dtype], label=f"{dtype}, {style}")
    axes[0, 0].set(
        yscale="log",
        xlabel="safety factor",
        ylabel="largest singular value after 6 steps",
        title="worst of all matrices",
    )
    axes[0, 0].legend(fontsize=7)
    for dtype in COLOURS:
        values = np.clip(precision["real momentum"][f"{dtype}, product"]["values"], 0, 1.3)
        axes[0, 1].hist(values, bins=120, histtype="step", color=COLOURS[dtype], label=dtype)
    axes[0, 1].set(yscale="log", xlabel="singular value after 6 steps", ylabel="count", title="real momentum")
    axes[0, 1].legend(fontsize=7)
    width = 0.27
    for i, dtype in enumerate(("float32", "float16", "bfloat16")):
        heights = [family[f"{dtype}, product"]["distance_to_exact"] for family in precision.values()]
        axes[1, 0].bar(np.arange(len(heights)) + (i - 1) * width, heights, width, color=COLOURS[dtype], label=dtype)
    axes[1, 0].set_xticks(range(len(precision)), [name.replace(" ", "\n") for name in precision], fontsize=7)
    axes[1, 0].set(yscale="log", title="relative distance of the update from fp64's")
    axes[1, 0].legend(fontsize=7)
    for name, colour in (("gaussian", "tab:purple"), ("real momentum", "tab:orange")):
        methods = ("polar express", "torch.optim.Muon", "Newton-Schulz, convergent")
        for method, mark in zip(methods, ("o-", "s--", ":"), strict=True):
            label = f"{method}, {name}"
            axes[1, 1].plot(range(1, 13), cost[name][method], mark, color=colour, markersize=3, label=label)
    axes[1, 1].set(yscale="log", xlabel="steps of three products", title="RMS of singular value - 1")
    axes[1, 1].legend(fontsize=7)
    plt.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
