"""The protocol that closes the loop between training and inference.

Reinforcement learning and evaluation see only `Sampler`, so an engine in the same process, an HTTP endpoint
and vLLM are interchangeable, and both are testable with fakes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from step35.api.sampling import SamplingParams


@dataclass(frozen=True)
class Completion:
    """One generated continuation. Tokens in, tokens out: text is never re-tokenised between turns."""

    token_ids: tuple[int, ...]
    """Generated ids, the end token included when one was generated."""
    logprobs: tuple[float, ...]
    """Log-probability of each generated token under the distribution it was drawn from."""
    finish_reason: str
    """Either "stop" (an end token) or "length" (max_tokens or the context were reached)."""
    version: int = 0
    """Version of the weights that generated it."""
    drafted: tuple[int, ...] = ()
    """Drafts verified at each MTP depth; empty without speculation."""
    accepted: tuple[int, ...] = ()
    """Drafts accepted at each MTP depth."""
    text: str = ""
    """The decoded continuation without special tokens, from samplers that own a tokenizer."""


class Sampler(Protocol):
    """Anything that continues token sequences."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Continue each prompt (token ids); results come in the order of the prompts."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return, for each sequence of T ids, the T-1 log-probabilities of ids 1..T-1 given what precedes."""
        ...

    def update_weights(self, state: Mapping[str, Any], version: int) -> None:
        """Take the tensors of `state` (names as in the model's state dict) and answer with `version` from now on."""
        ...
