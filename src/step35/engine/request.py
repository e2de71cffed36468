"""One generation in progress: its tokens, where it stands in the cache, and its own randomness."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from step35.api.constraint import Constraint
from step35.api.sampler import Completion, TopLogprobs
from step35.api.sampling import SamplingParams
from step35.engine.blocks import BLOCK_TOKENS, chain
from step35.engine.stop_text import StopText
from step35.errors import ConfigError


@dataclass(eq=False)
class Request:
    """A prompt, its parameters, what has been generated so far, and the blocks that hold it."""

    prompt: list[int]
    params: SamplingParams
    end_ids: frozenset[int]
    limit: int
    """Most tokens to generate: max_tokens, or what the context leaves."""
    uniforms: array[float]
    """One number in [0, 1) for each token to come: the request's whole randomness, independent of its batch."""
    tokens: list[int]
    """All known tokens: the prompt, then what was generated."""
    drafted: list[int]
    """Drafts offered at each depth."""
    accepted: list[int]
    """Drafts accepted at each depth."""
    constraint: Constraint | None = None
    greedy: bool = False
    """Whether the likeliest tokens are taken as the logits stand, and nothing else is asked of these."""
    text: StopText | None = None
    """Turns tokens to text where somebody reads it, or where stop texts have to be found."""
    depth: int = 0
    """Drafts to make in the next pass: at most `params.speculate`."""
    drafts: list[int] = field(default_factory=list)
    """Tokens that the modules propose behind the known ones, in this pass."""
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    salt: bytes = b""
    """Sets apart prefixes that must not be shared: of other weights, or without the modules' part."""
    cached: int = 0
    """Prompt tokens found in the cache when the request first ran."""
    full: array[int] = field(default_factory=lambda: array("i"))
    """Blocks of full layers, 32-bit, as the compiled passes read them."""
    window: array[int] = field(default_factory=lambda: array("i"))
    """Blocks of sliding layers."""
    computed: int = 0
    """Positions that the trunk has run and that hold known tokens."""
    module_done: list[int] = field(default_factory=list)
    """For each MTP module in use, the first slot that it has not run with known tokens."""
    published: int = 0
    freed: int = 0
    _keys: list[bytes] = field(default_factory=list)

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
        uniforms = array("d", torch.rand(limit, generator=generator, dtype=torch.float64).tolist())
        depth = params.speculate
        request = cls(list(prompt), params, ends, limit, uniforms, list(prompt), [0] * depth, [0] * depth)
        request.depth = depth
        request.forget_blocks()
        return request

    @property
    def generated(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[len(self.prompt) :]

    @property
    def length(self) -> int:
        """Tokens known so far, the prompt included."""
        return len(self.tokens)

    @property
    def generated_count(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def decoding(self) -> bool:
        """Whether all known tokens but the last have run, so that drafts can be made."""
        return self.computed == len(self.tokens) - 1 and self.generated_count > 0

    @property
    def reading(self) -> bool:
        """Whether the last pass ran tokens that were known before: a prompt's."""
        return not self.decoding or self.generated_count == 1

    @property
    def behind(self) -> int:
        """Positions that the trunk has run and some module in use has not."""
        return self.computed - self.settled

    @property
    def settled(self) -> int:
        """Positions whose slots, those of the modules in use included, will not be written again."""
        return min([self.computed, *self.module_done])

    def uniform(self, ahead: int) -> float:
        """Return the random number of the token `ahead` places after the next one."""
        return self.uniforms[min(self.generated_count + ahead, self.limit - 1)]

    def extend(self, tokens: list[int], logprobs: list[float], raw_logprobs: list[float], version: int) -> int:
        """Take tokens up to the one that ends the request, if any does; return how many."""
        count, left = 0, self.limit - self.generated_count
        for token in tokens:
            count += 1
            self.tokens.append(token)
            if self.constraint is not None:
                self.constraint.advance(token)
            if token in self.end_ids or (self.text is not None and self.text.push(token)):
                self.finish_reason = "stop"
            elif count == left:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                break
        self.logprobs += logprobs[:count]
        self.raw_logprobs += raw_logprobs[:count]
        self.versions += [version] * count
        if self.finish_reason is not None and self.text is not None:
            self.text.flush()
        return count

    def key(self, block: int) -> bytes:
        """Return what names the content of the request's block number `block`, whose tokens are known."""
        while len(self._keys) <= block:
            start = len(self._keys) * BLOCK_TOKENS
            before = self._keys[-1] if self._keys else self.salt
            self._keys.append(chain(before, self.tokens[start : start + BLOCK_TOKENS]))
        return self._keys[block]

    def rekey(self, salt: bytes) -> None:
        """Change what sets the request's blocks apart; only before it holds any."""
        self.salt, self._keys = salt, []

    def start_at(self, position: int) -> None:
        """Begin behind a prefix whose slots are all known."""
        self.computed = position
        self.module_done = [max(position, k + 1) for k in range(self.params.speculate)]
        self.published = self.freed = position // BLOCK_TOKENS

    def forget_blocks(self) -> None:
        """Stand before the first token again; what was generated stays known."""
        self.full, self.window, self.drafts = array("i"), array("i"), []
        self.start_at(0)

    def completion(self, text: str = "") -> Completion:
        """Return the finished generation."""
        return Completion(
            tuple(self.generated),
            tuple(self.logprobs),
            self.finish_reason or "length",
            self.versions[-1] if self.versions else 0,
            tuple(self.drafted),
            tuple(self.accepted),
            text,
            tuple(self.raw_logprobs),
            tuple(self.top_logprobs),
            tuple(self.prompt_logprobs),
            tuple(self.prompt_top_logprobs),
            tuple(self.versions),
            self.cached,
        )
