"""Sampling against brute force over a small vocabulary, and against the exact distribution by chi-square."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from step35.api.sampling import SamplingParams
from step35.engine.sampling import choose

LOGITS = [0.3, -1.2, 2.0, 0.9, 0.0, -3.0, 1.4, 0.6]
DRAWS = 20_000

CASES = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=3.0),
    "top-k": SamplingParams(top_k=3),
    "top-k of one": SamplingParams(top_k=1),
    "top-k beyond the vocabulary": SamplingParams(top_k=50),
    "top-p": SamplingParams(top_p=0.8),
    "top-p of one token": SamplingParams(top_p=0.1),
    "cold top-p": SamplingParams(temperature=0.7, top_p=0.6),
}


def distribution(logits: list[float], params: SamplingParams) -> list[float]:
    """Return the probabilities of top-k or top-p sampling, the slow way."""
    weights = [math.exp(x / params.temperature) for x in logits]
    probabilities = [w / sum(weights) for w in weights]
    ranked = sorted(range(len(logits)), key=lambda i: -probabilities[i])[: params.top_k or None]
    kept: list[int] = []
    while ranked and sum(probabilities[i] for i in kept) < params.top_p:
        kept.append(ranked.pop(0))
    mass = sum(probabilities[i] for i in kept)
    return [p / mass if i in kept else 0.0 for i, p in enumerate(probabilities)]


def pick(logits_NV: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose tokens, and return the log-probabilities of these alone."""
    tokens, logprobs_NV = choose(logits_NV, *rest)
    return tokens, logprobs_NV.gather(1, tokens[:, None])[:, 0]


def draw(logits: list[float], params: SamplingParams, uniforms: list[float]) -> tuple[list[int], list[float]]:
    tokens, logprobs = pick(torch.tensor([logits]).expand(len(uniforms), -1), [params] * len(uniforms), uniforms)
    return tokens.tolist(), logprobs.tolist()


@pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())
def test_token_is_the_inverse_of_the_cumulative_distribution(params: SamplingParams) -> None:
    expected = distribution(LOGITS, params)
    cumulative = list(itertools.accumulate(expected))
    uniforms = [(i + 0.5) / 997 for i in range(997)]
    tokens, logprobs = draw(LOGITS, params, uniforms)
    assert tokens == [next(i for i, c in enumerate(cumulative) if c > u) for u in uniforms]
    assert logprobs == pytest.approx([math.log(expected[token]) for token in tokens], abs=1e-5)


@pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())
def test_frequencies_pass_a_chi_square_test(params: SamplingParams) -> None:
    expected = distribution(LOGITS, params)
    uniforms = torch.rand(DRAWS, generator=torch.Generator().manual_seed(5), dtype=torch.float64).tolist()
    tokens, _ = draw(LOGITS, params, uniforms)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(LOGITS)).tolist()
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    statistic = sum((n - DRAWS * p) ** 2 / (DRAWS * p) for n, p in zip(counts, expected, strict=True) if p)
    assert statistic < 40  # with 7 degrees of freedom or fewer, true frequencies exceed it once in a million


def test_the_ends_of_the_unit_interval_give_possible_tokens() -> None:
    logits = [-math.inf, 0.0, -math.inf, 1.0, -math.inf]
    tokens, logprobs = draw(logits, SamplingParams(), [0.0, 1.0 - 2.0**-53])
    assert tokens == [1, 3]
    assert all(map(math.isfinite, logprobs))


def test_greedy_takes_the_largest_logit_and_reports_the_unmodified_distribution() -> None:
    logits_NV = torch.randn(20, 11, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = pick(logits_NV, [SamplingParams(temperature=0.0)] * 20, [0.999] * 20)
    assert tokens.tolist() == [row.index(max(row)) for row in logits_NV.tolist()]
    expected = [max(row) - math.log(sum(map(math.exp, row))) for row in logits_NV.tolist()]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("greedy", [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, top_k=2)])
def test_a_greedy_row_is_the_same_alone_and_beside_sampled_rows(greedy: SamplingParams) -> None:
    others = [SamplingParams(temperature=2.0), SamplingParams(top_p=0.5), SamplingParams(top_k=2)]
    alone = pick(torch.tensor([LOGITS]), [greedy], [0.9])
    mixed = pick(torch.tensor([LOGITS] * 4), [greedy, *others], [0.9] * 4)
    assert mixed[0][0] == alone[0][0]
    assert float(mixed[1][0]) == pytest.approx(float(alone[1][0]), abs=1e-6)


def test_a_sampled_row_is_the_same_alone_and_beside_truncated_rows() -> None:
    # The second token has 2e-9 of the mass: below fp32's resolution next to 1, but not below a uniform's.
    logits, plain, unlikely = [20.0, 0.0], SamplingParams(), 1.0 - 1e-9
    alone = pick(torch.tensor([logits]), [plain], [unlikely])
    mixed = pick(torch.tensor([logits] * 2), [plain, SamplingParams(top_k=1)], [unlikely] * 2)
    assert int(alone[0][0]) == 1
    assert int(mixed[0][0]) == 1


def test_rows_have_their_own_parameters() -> None:
    params = list(CASES.values())
    uniforms = [(i + 0.5) / len(params) for i in range(len(params))]
    tokens, logprobs = pick(torch.tensor([LOGITS] * len(params)), params, uniforms)
    for row, (own, uniform) in enumerate(zip(params, uniforms, strict=True)):
        single = draw(LOGITS, own, [uniform])
        assert int(tokens[row]) == single[0][0]
        assert float(logprobs[row]) == pytest.approx(single[1][0], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("speculate", -1)],
)
def test_parameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SamplingParams(**{name: value})
