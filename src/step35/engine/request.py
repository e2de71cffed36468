"""One generation in progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.errors import ConfigError


@dataclass
class Request:
    """A prompt, its parameters, and what has been generated so far."""

    prompt: list[int]
    params: SamplingParams
    end_ids: frozenset[int]
    limit: int
    """Most tokens to generate: max_tokens, or what the context leaves."""
    uniforms: Tensor
    """One number in [0, 1) for each token to come: the request's whole randomness, independent of its batch."""
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    """Drafts offered at each depth."""
    accepted: list[int] = field(default_factory=list)
    """Drafts accepted at each depth."""
    finish_reason: str | None = None

    @classmethod
    def create(cls, prompt: Sequence[int], params: SamplingParams, eos_ids: Sequence[int], context: int) -> Request:
        """Check the prompt against the context length and draw the request's random numbers."""
        if not prompt:
            raise ConfigError("the prompt is empty; give at least one token, for example the BOS token")
        if len(prompt) >= context:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, but the context holds {context}; shorten it or raise max_context"
            )
        limit = min(params.max_tokens, context - len(prompt))
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))
        depths = [0] * params.speculate
        uniforms = torch.rand(limit, generator=generator, dtype=torch.float64)
        return cls(list(prompt), params, ends, limit, uniforms, drafted=list(depths), accepted=list(depths))

    @property
    def length(self) -> int:
        """Tokens known so far, the prompt included."""
        return len(self.prompt) + len(self.generated)

    def uniform(self, ahead: int) -> float:
        """Return the random number of the token `ahead` places after the next one."""
        return float(self.uniforms[min(len(self.generated) + ahead, self.limit - 1)])

    def append(self, token: int, logprob: float) -> bool:
        """Take one token; return whether the request goes on."""
        self.generated.append(token)
        self.logprobs.append(logprob)
        if token in self.end_ids:
            self.finish_reason = "stop"
        elif len(self.generated) >= self.limit:
            self.finish_reason = "length"
        return self.finish_reason is None

    def completion(self, version: int) -> Completion:
        """Return the finished generation."""
        return Completion(
            tuple(self.generated),
            tuple(self.logprobs),
            self.finish_reason or "length",
            version,
            tuple(self.drafted),
            tuple(self.accepted),
        )
