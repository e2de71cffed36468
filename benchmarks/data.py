"""Packing and prefetch of the mixture: what packing saves, what a window costs, and whether prefetch hides that.

Documents are made up, with log-normal lengths. A training step is stood in for by matrix products, which leave the
interpreter to the prefetching thread as a model's do.

    python benchmarks/data.py [--context 16384] [--median 60] [--rows 16] [--step-ms 600] [--out FILE]

The last line is JSON with the figures; the result file holds command, commit and machine as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from step35.data.loader import Loader
from step35.data.prefetch import Prefetch
from step35.data.sampler import MixtureLoader
from step35.data.shards import ShardWriter, TokenShards
from step35.runtime.machine import environment

RESULTS = Path(__file__).parent / "results"
WEIGHTS = {"web": 0.6, "code": 0.3, "books": 0.1}
TOKENS = 6_000_000
"""Tokens of each source."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--median", type=int, default=60, help="median length of a document in tokens")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--step-ms", type=float, default=600.0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "data.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: write_source(Path(folder, name), args.median, n) for n, name in enumerate(WEIGHTS)}
        figures = packing(sources, args.context)
        for name, wrap in (("plain", lambda loader: loader), ("prefetched", Prefetch)):
            loader: Loader = wrap(mixture(sources, args.context))
            figures[name] = step_times(loader, args.rows, args.steps, args.step_ms / 1e3)
    command = " ".join(["python", "benchmarks/data.py", *sys.argv[1:]])
    args.out.write_text(json.dumps({"command": command, "environment": environment(), **figures}, indent=1) + "\n")
    print(json.dumps(figures))


def write_source(folder: Path, median: int, seed: int) -> TokenShards:
    draw = np.random.default_rng(seed)
    with ShardWriter(folder, 2**16) as writer:
        left = TOKENS
        while left > 0:
            length = 2 + int(draw.lognormal(np.log(median), 1.2))
            writer.add(np.arange(length) % 2**16, "text")
            left -= length
    return TokenShards(folder)


def mixture(sources: dict[str, TokenShards], context: int) -> MixtureLoader:
    return MixtureLoader(sources, WEIGHTS, context=context, seed=0)


def packing(sources: dict[str, TokenShards], context: int) -> dict[str, Any]:
    """Compare the window's packing with cutting the plain stream into rows; time laying out a window."""
    loader = mixture(sources, context)
    started = time.perf_counter()
    found = loader.packing(4)
    return {
        "window_ms": (time.perf_counter() - started) / 4 * 1e3,
        "pieces_per_row": found.pieces_per_row,
        "fitting_documents_cut": found.cut,
        "fitting_documents_cut_in_a_plain_stream": sum(
            weight * cut_in_stream(sources[name], context) for name, weight in WEIGHTS.items()
        ),
        "share_of_targets": found.targets,
        "padding": 0.0,
    }


def cut_in_stream(shards: TokenShards, context: int) -> float:
    """Return the share of fitting documents that rows of consecutive tokens cut."""
    starts, lengths = shards.document_starts, shards.document_lengths
    cut = starts // context != (starts + lengths - 1) // context
    return float(cut[lengths <= context].mean())


def step_times(loader: Loader, rows: int, steps: int, seconds: float) -> dict[str, float]:
    """Return the times of steps whose work besides the data takes `seconds`, and of the waits for data in them."""
    matrix = torch.ones(1024, 1024)
    waits, times = [], []
    for step in range(steps):
        started = time.perf_counter()
        loader.rows(step * rows, rows)
        waits.append(1e3 * (time.perf_counter() - started))
        while time.perf_counter() - started < seconds + waits[-1] / 1e3:
            torch.mm(matrix, matrix)
        times.append(1e3 * (time.perf_counter() - started))
    del waits[0], times[0]  # nobody can prepare the first batch ahead
    median, largest = statistics.median(times), max(times)
    return {
        "step_median_ms": median,
        "step_max_ms": largest,
        "step_max_to_median": largest / median,
        "wait_median_ms": statistics.median(waits),
        "wait_max_ms": max(waits),
    }


if __name__ == "__main__":
    main()
