"""From logits to tokens: temperature, top-k, top-p, and one given uniform number per token.

The token is the inverse of the cumulative distribution at that number, so a request's tokens depend on its logits
and its own random numbers only: not on its batch, and not on whether drafts were verified along with it.
"""

# N positions to sample  V vocab

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from step35.api.sampling import SamplingParams

UNMODIFIED = SamplingParams()
"""Stands in for greedy positions, whose log-probabilities no setting changes."""


def choose(logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return tokens (N,) and their log-probabilities (N,) under the distribution they were drawn from.

    Greedy positions (temperature 0) report the log-probability under the unmodified distribution.
    """
    greedy = torch.tensor([p.temperature == 0 for p in params], device=logits_NV.device)
    if bool(greedy.all()):
        tokens = logits_NV.argmax(-1)
        return tokens, _gather(logits_NV.log_softmax(-1), tokens)
    sampled = [p if p.temperature else UNMODIFIED for p in params]
    temperatures = torch.tensor([p.temperature for p in sampled], device=logits_NV.device)
    logits_NV = _truncate(logits_NV / temperatures[:, None], sampled)
    logprobs_NV = logits_NV.log_softmax(-1)
    cumulative = logprobs_NV.double().exp().cumsum(-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=logits_NV.device) * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0].clamp(max=logits_NV.shape[-1] - 1)
    tokens = torch.where(greedy, logits_NV.argmax(-1), drawn)
    return tokens, _gather(logprobs_NV, tokens)


def _truncate(logits_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Set to -inf what top-k and top-p leave out; without either, return the logits untouched."""
    vocabulary = logits_NV.shape[-1]
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


def _gather(logprobs_NV: Tensor, tokens_N: Tensor) -> Tensor:
    return logprobs_NV.gather(-1, tokens_N[:, None])[:, 0]
