"""From logits to tokens: bias, penalties, masks, temperature, cuts, and one given uniform number per token.

The token is the inverse of the cumulative distribution at that number, so a request's tokens depend on its logits
and its own random numbers only: not on its batch, and not on whether drafts were verified along with it.
"""

# N positions to sample  V vocab

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from step35.api.sampling import SamplingParams

UNMODIFIED = SamplingParams()
"""Stands in for greedy positions, whose log-probabilities no setting changes."""


@dataclass(frozen=True)
class Place:
    """One position to sample: its request's settings, its random number, and what came before it."""

    params: SamplingParams
    uniform: float
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    """Tokens generated before this place, drafts that are taken for granted included; only penalties need them."""
    allowed: Tensor | None = None
    """Which tokens a constraint permits (V,)."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as the logits stand."""
        return self.allowed is None and takes_likeliest(self.params)


class Scores(NamedTuple):
    """The logits (N, V) of N places, and what is needed of most: the likeliest tokens and their log-probabilities."""

    logits_NV: Tensor
    best: list[int]
    best_logprobs: list[float]

    @classmethod
    def of(cls, logits_NV: Tensor) -> Scores:
        """Find the likeliest tokens."""
        top_N, best_N = logits_NV.max(-1)
        return cls(logits_NV, best_N.tolist(), (top_N - logits_NV.logsumexp(-1)).tolist())

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Return the scores of several parts, one behind the other."""
        return cls(
            torch.cat([part.logits_NV for part in parts]),
            [token for part in parts for token in part.best],
            [logprob for part in parts for logprob in part.best_logprobs],
        )


class Choice(NamedTuple):
    """The tokens chosen at N places, and their log-probabilities as processed and as the model gave them."""

    tokens: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    logprobs_NV: Tensor | None = None
    """Those of all tokens, unless only the likeliest were asked for."""
    raw_NV: Tensor | None = None

    @classmethod
    def likeliest(cls, scores: Scores) -> Choice:
        """Choose the likeliest tokens."""
        return cls(scores.best, scores.best_logprobs, scores.best_logprobs)


def pick(scores: Scores, places: Sequence[Place]) -> Choice:
    """Choose a token at every place."""
    logits_NV = scores.logits_NV
    adjusted_NV = adjust(logits_NV, places)
    tokens_N, logprobs_NV = choose(adjusted_NV, [p.params for p in places], [p.uniform for p in places])
    plain = adjusted_NV is logits_NV and not any(reshapes(p.params) for p in places)
    raw_NV = logprobs_NV if plain else logits_NV.log_softmax(-1)
    logprobs, raw = (values_NV.gather(1, tokens_N[:, None])[:, 0].tolist() for values_NV in (logprobs_NV, raw_NV))
    for n, place in enumerate(places):
        if place.greedy:  # to the last bit as when all places are
            logprobs[n] = raw[n] = scores.best_logprobs[n]
    return Choice(tokens_N.tolist(), logprobs, raw, logprobs_NV, raw_NV)


def adjust(logits_NV: Tensor, places: Sequence[Place]) -> Tensor:
    """Apply bias, penalties and masks row by row where a place asks for any; otherwise return the logits untouched."""
    rows = {n: place for n, place in enumerate(places) if place.allowed is not None or shifts_logits(place.params)}
    if not rows:
        return logits_NV
    logits_NV = logits_NV.clone()
    for n, place in rows.items():
        _shift(logits_NV[n], place)
        if place.allowed is not None:
            logits_NV[n].masked_fill_(~place.allowed.to(logits_NV.device), float("-inf"))
    return logits_NV


def shifts_logits(params: SamplingParams) -> bool:
    """Return whether penalties or a bias move the logits."""
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    return bool(penalised or params.logit_bias)


def takes_likeliest(params: SamplingParams) -> bool:
    """Return whether the likeliest token is taken as the logits stand."""
    return params.temperature == 0 and not shifts_logits(params)


def reshapes(params: SamplingParams) -> bool:
    """Return whether `choose` draws from another distribution than that of the logits."""
    truncated = params.top_p < 1 or params.top_k or params.min_p
    return bool(params.temperature not in (0, 1) or (params.temperature and truncated))


def _shift(logits_V: Tensor, place: Place) -> None:
    """Repetition counts prompt and answer; presence and frequency count the answer, as the OpenAI API says."""
    params = place.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*place.prompt, *place.answer}), device=logits_V.device)
        old = logits_V[seen]
        logits_V[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if place.answer and (params.presence_penalty or params.frequency_penalty):
        answer = torch.tensor(place.answer, device=logits_V.device)
        counts_V = torch.bincount(answer, minlength=len(logits_V)).to(logits_V.dtype)
        logits_V -= params.presence_penalty * (counts_V > 0) + params.frequency_penalty * counts_V
    for token, bias in params.logit_bias.items():
        logits_V[token] += bias


def most_likely(logprobs_NV: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """Return at each place the `count` likeliest tokens and their log-probabilities, the likeliest first."""
    values_NK, tokens_NK = logprobs_NV.topk(min(count, logprobs_NV.shape[-1]))
    rows = zip(tokens_NK.tolist(), values_NK.tolist(), strict=True)
    return [tuple(zip(tokens, values, strict=True)) for tokens, values in rows]


def choose(logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return tokens (N,) and the log-probabilities (N, V) under which they were drawn.

    Greedy positions (temperature 0) report the log-probability under the unmodified distribution.
    """
    if all(p.temperature == 0 for p in params):
        return logits_NV.argmax(-1), logits_NV.log_softmax(-1)
    greedy = torch.tensor([p.temperature == 0 for p in params], device=logits_NV.device)
    sampled = [p if p.temperature else UNMODIFIED for p in params]
    temperatures = torch.tensor([p.temperature for p in sampled], device=logits_NV.device)
    logits_NV = _truncate(logits_NV / temperatures[:, None], sampled)
    logprobs_NV = logits_NV.log_softmax(-1)
    cumulative = logprobs_NV.double().exp().cumsum(-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=logits_NV.device) * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0].clamp(max=logits_NV.shape[-1] - 1)
    tokens = torch.where(greedy, logits_NV.argmax(-1), drawn)
    return tokens, logprobs_NV


def _truncate(logits_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Set to -inf what min-p, top-k and top-p leave out; without any, return the logits untouched."""
    vocabulary = logits_NV.shape[-1]
    if any(p.min_p for p in params):
        floor = torch.tensor([p.min_p for p in params], device=logits_NV.device).log()[:, None]
        logits_NV = logits_NV.masked_fill(logits_NV < logits_NV.amax(-1, keepdim=True) + floor, float("-inf"))
    if all(p.top_p >= 1 and not p.top_k for p in params):
        return logits_NV
    ordered, order = logits_NV.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=logits_NV.device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=logits_NV.device)[:, None]
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # Rounding may lift `before` to 1, so "keep everything" is not left to the comparison.
    keep = (torch.arange(vocabulary, device=logits_NV.device) < top_k) & ((top_p >= 1) | (before < top_p))
    kept = torch.zeros_like(keep).scatter(-1, order, keep)
    return logits_NV.masked_fill(~kept, float("-inf"))
