"""What every engine measures, by the same prompts in the same order. Standard library only: runs in any environment.

A job has rounds of prompts as token ids, all different, so that no engine finds a prefix in its cache. The first round
warms up and decodes less.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Speeds = dict[str, list[float]]
"""Tokens/s of each repeat, by what was measured."""


@dataclass(frozen=True)
class Timing:
    """How long a generation took, from its start."""

    first_s: float
    """Until the first token of any prompt is known."""
    total_s: float


Generate = Callable[[Sequence[Sequence[int]], int], Timing]
"""From prompts and the number of new tokens of each, end tokens ignored, to the times."""


def load() -> tuple[dict[str, Any], Path]:
    """Return the job that the command line names, and where its result goes."""
    return json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])


def say(text: str) -> None:
    """Report progress."""
    print(f"> {text}", file=sys.stderr, flush=True)


def measure(job: dict[str, Any], generate: Generate) -> Speeds:
    """Run all rounds and return the speeds; the first round is not counted.

    `decode` is of one sequence from its first token to its last; `concurrent` counts the new tokens of all prompts
    over the whole time, reading the prompts included; `prefill_N` is a prompt of N tokens until its first new token.
    """
    speeds: Speeds = {}
    for number, prompts in enumerate(job["rounds"]):
        new = job["new_tokens"] if number else min(8, job["new_tokens"])
        found = _round(prompts, new, generate)
        if number:
            for what, speed in found.items():
                speeds.setdefault(what, []).append(speed)
        shown = ", ".join(f"{what} {speed:,.0f}" for what, speed in found.items())
        say(f"{job['variant']}: {f'repeat {number}' if number else 'warm-up'}: {shown} tokens/s")
    return speeds


def _round(prompts: dict[str, Any], new: int, generate: Generate) -> dict[str, float]:
    found = {f"prefill_{len(prompt)}": len(prompt) / generate([prompt], 1).total_s for prompt in prompts["prefill"]}
    timing = generate([prompts["single"]], new)
    found["decode"] = (new - 1) / (timing.total_s - timing.first_s)
    found["concurrent"] = len(prompts["batch"]) * new / generate(prompts["batch"], new).total_s
    return found


def add_tasks(speeds: Speeds, drafts: int, counts: Sequence[int], timings: Sequence[Timing]) -> None:
    """Add the speeds of one round of tasks: new tokens over the whole time, and from each one's first token on."""
    name, tokens = (f"mtp{drafts}" if drafts else "plain"), sum(counts)
    whole, decoding = sum(t.total_s for t in timings), sum(t.total_s - t.first_s for t in timings)
    speeds.setdefault(f"tasks_{name}", []).append(tokens / whole)
    speeds.setdefault(f"tasks_decode_{name}", []).append((tokens - len(counts)) / decoding)


def save(out: Path, version: str, speeds: Speeds, **more: Any) -> None:
    """Write the result."""
    out.write_text(json.dumps({"version": version, "speeds": speeds, **more}))
