"""Decode speed at batch 1, plain against speculative, on the same prompts, with a check that the tokens are equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

from step35.api.sampler import Sampler
from step35.api.sampling import SamplingParams

Stream = Callable[[Sequence[int], SamplingParams], Iterator[list[int]]]
"""Yields the new tokens of each pass; the first pass is the prompt's."""


def compare(
    stream: Stream, prompts: Sequence[Sequence[int]], *, depth: int, max_tokens: int, repeats: int = 3
) -> dict[str, Any]:
    """Decode every prompt greedily both ways in turn, the prompt's own pass left out.

    Each prompt counts with the fastest of `repeats`: whatever else the machine does only ever adds time.
    """
    fastest: dict[int, list[float]] = {0: [inf] * len(prompts), depth: [inf] * len(prompts)}
    outputs: dict[int, list[list[int]]] = {0: [[] for _ in prompts], depth: [[] for _ in prompts]}
    for repeat in range(-1, repeats):  # the first round warms up and is not counted
        for number, prompt in enumerate(prompts):
            for drafts in fastest:
                params = SamplingParams(max_tokens=max_tokens, temperature=0.0, speculate=drafts)
                outputs[drafts][number], seconds = decode(stream, prompt, params)
                if repeat >= 0:
                    fastest[drafts][number] = min(fastest[drafts][number], seconds)
    counted = {drafts: sum(len(tokens) - 1 for tokens in outputs[drafts]) for drafts in fastest}
    plain, speculative = (counted[drafts] / sum(fastest[drafts]) for drafts in (0, depth))
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
