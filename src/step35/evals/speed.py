"""Decode speed at batch 1, plain against speculative, on the same prompts, with a check that the tokens are equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

from step35.api.sampler import Sampler
from step35.api.sampling import SamplingParams

Stream = Callable[[Sequence[int], SamplingParams], Iterator[list[int]]]
"""Yields the new tokens of each pass; the first pass is the prompt's."""


def compare(
    stream: Stream, prompts: Sequence[Sequence[int]], *, depth: int, max_tokens: int, repeats: int = 3
) -> dict[str, Any]:
    """Decode every prompt greedily both ways, alternating; rates are medians of `repeats` and leave the prompt out."""
    rates: dict[int, list[float]] = {0: [], depth: []}
    outputs: dict[int, list[list[int]]] = {}
    for repeat in range(-1, repeats):  # the first round warms up and is not counted
        for drafts in rates:
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, speculate=drafts)
            runs = [decode(stream, prompt, params) for prompt in prompts]
            outputs[drafts] = [tokens for tokens, _ in runs]
            if repeat >= 0:
                counted = sum(len(tokens) - 1 for tokens, _ in runs)
                rates[drafts].append(counted / sum(seconds for _, seconds in runs))
    plain, speculative = median(rates[0]), median(rates[depth])
    return {
        "plain_tokens_per_s": plain,
        "speculative_tokens_per_s": speculative,
        "speedup": speculative / plain if plain else 1.0,  # answers of one token have no rate
        "equal": outputs[0] == outputs[depth],
        "prompts": len(prompts),
        "tokens": sum(len(tokens) for tokens in outputs[0]),
        "depth": depth,
    }


def decode(stream: Stream, prompt: Sequence[int], params: SamplingParams) -> tuple[list[int], float]:
    """Return the generated tokens, and the seconds from the first of them to the last."""
    tokens: list[int] = []
    started = 0.0
    for new in stream(prompt, params):
        if not tokens:
            started = time.perf_counter()
            tokens += new[:1]
            new = new[1:]
        tokens += new
    return tokens, time.perf_counter() - started


def acceptance(sampler: Sampler, prompts: Sequence[Sequence[int]], *, depth: int, max_tokens: int) -> list[float]:
    """Return, for each MTP depth, the share of verified drafts that greedy decoding accepted."""
    completions = sampler.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0, speculate=depth))
    drafted = [sum(c.drafted[k] for c in completions) for k in range(depth)]
    accepted = [sum(c.accepted[k] for c in completions) for k in range(depth)]
    return [a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)]
