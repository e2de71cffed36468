"""The protocol that closes the loop between training and inference.

Reinforcement learning and evaluation see only `Sampler`, so an engine in the same process, an HTTP endpoint
and vLLM are interchangeable, and both are testable with fakes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from step35.api.sampling import SamplingParams

TopLogprobs = tuple[tuple[int, float], ...]
"""Token ids and their log-probabilities, the likeliest first."""


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
    raw_logprobs: tuple[float, ...] = ()
    """Log-probability of each generated token under the model's own distribution."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """The likeliest tokens at each place, when they were asked for."""
    prompt_logprobs: tuple[float, ...] = ()
    """Log-probability of each prompt token but the first, when they were asked for."""
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()
    """The likeliest tokens at the place of each prompt token but the first, when they were asked for."""
    versions: tuple[int, ...] = ()
    """Version of the weights behind each generated token."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values came from an earlier request."""


@dataclass(frozen=True)
class Update:
    """What one pass added to a generation that is being streamed."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each new token, under the distribution it was drawn from."""
    raw_logprobs: tuple[float, ...]
    """Of each new token, under the model's own distribution."""
    top_logprobs: tuple[TopLogprobs, ...]
    """The likeliest tokens at each new place; empty unless they were asked for."""
    text: str
    """New text, special tokens included but not the end token; never half a character, never the start of a stop
    text. Joined over all updates it is the generation's text."""
    finish_reason: str | None = None
    """None until the last update: then "stop", "length" or "cancelled"."""
    completion: Completion | None = None
    """The whole generation, with the last update."""

    def and_then(self, later: Update) -> Update:
        """Return this update and the one after it as one."""
        return Update(
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            self.raw_logprobs + later.raw_logprobs,
            self.top_logprobs + later.top_logprobs,
            self.text + later.text,
            later.finish_reason,
            later.completion,
        )


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


class AsyncSampler(Protocol):
    """Generates for many callers at once, token by token; what a server stands in front of."""

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> AsyncIterator[Update]:
        """Continue the prompt; closing the iterator, or cancelling the task that reads it, ends the generation.

        Raises `ConfigError` before the first update when the prompt or the parameters cannot be served.
        """
        ...

    def statistics(self) -> Mapping[str, float]:
        """Return counters and gauges by name: what the server shows under /metrics."""
        ...
