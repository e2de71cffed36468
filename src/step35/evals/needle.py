"""The needle probe: does the model find a number it was told far back? By context length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from step35.api.sampler import Sampler
from step35.api.sampling import SamplingParams
from step35.data.needle import needles
from step35.data.tokenizer import Tokenizer
from step35.evals.stats import wilson

DEPTHS = 8
"""Parts of the context by which the result is broken down."""


def find_needles(sampler: Sampler, tokenizer: Tokenizer, *, context: int, prompts: int, seed: int) -> dict[str, Any]:
    """Return accuracy over `prompts` greedy answers at `context` tokens, its 95% interval, and accuracy by depth.

    "by_depth" has `DEPTHS` entries, from the start of the prompt to its end; None where no prompt fell.
    """
    asked = needles(tokenizer, context=context, prompts=prompts, seed=seed)
    longest = max(len(tokenizer.encode(f" {needle.answer}")) for needle in asked)
    params = SamplingParams(max_tokens=longest, temperature=0.0, speculate=0)
    answers = sampler.generate([needle.ids for needle in asked], params)
    right = [
        tokenizer.decode(list(answer.token_ids)).strip().startswith(needle.answer)
        for needle, answer in zip(asked, answers, strict=True)
    ]
    parts: list[list[bool]] = [[] for _ in range(DEPTHS)]
    for needle, correct in zip(asked, right, strict=True):
        parts[min(DEPTHS - 1, int(needle.depth * DEPTHS))].append(correct)
    low, high = wilson(sum(right), len(right))
    return {
        "context": context,
        "prompts": len(right),
        "accuracy": _mean(right),
        "low": low,
        "high": high,
        "by_depth": [_mean(part) if part else None for part in parts],
    }


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
