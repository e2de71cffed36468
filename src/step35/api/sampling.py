"""How to sample: the parameters that a caller may set for one generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from step35.api.messages import ToolSchema


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What a generation may say; exactly one of the three kinds is given."""

    json_schema: Mapping[str, Any] | None = None
    """A JSON value that fits this schema."""
    regex: str | None = None
    """A text that this expression matches as a whole."""
    tools: tuple[ToolSchema, ...] = ()
    """One or more calls of these tools, in the chat format's XML, each parameter of its declared type."""

    def __post_init__(self) -> None:
        given = [name for name in ("json_schema", "regex", "tools") if getattr(self, name) not in (None, ())]
        if len(given) != 1:
            raise ValueError(f"Grammar got {given or 'nothing'}; give exactly one of json_schema, regex and tools.")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Decoding parameters. The defaults are the report's: temperature 1, top-p 1."""

    max_tokens: int = 256
    """Most new tokens to generate."""
    temperature: float = 1.0
    """0 is greedy decoding; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep only tokens with at least this share of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens in the prompt or the answer by this; 1 is none."""
    presence_penalty: float = 0.0
    """Subtract this from the logit of every token in the answer so far."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit once for each time it stands in the answer so far."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Seed of this request's own random stream; None draws one."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the generation, besides the model's own end tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; the text ends before the first of them."""
    top_logprobs: int = 0
    """Report this many of the likeliest tokens at every place."""
    logprobs_of: Literal["raw", "processed"] = "raw"
    """Distribution that `top_logprobs` reports: the model's own, or what penalties, temperature and cuts leave."""
    prompt_logprobs: int | None = None
    """Report the log-probability of every prompt token but the first, and this many of the likeliest tokens there; None
    reports nothing."""
    grammar: Grammar | None = None
    """What the generation may say; in a chat turn, from the end of the thinking on."""
    thinking_budget: int | None = None
    """Most tokens of thinking: then the think block is closed. None sets no limit."""
    in_thinking: bool = False
    """Whether the prompt ends in an open think block, as the chat format's generation prompt does."""
    ignore_eos: bool = False
    """Go on past the end tokens (for benchmarks)."""
    speculate: int = 0
    """Draft this many tokens with the MTP modules in each step (0 to the model's number of modules)."""

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("max_tokens", self.max_tokens >= 1, "an integer of at least 1"),
            ("temperature", self.temperature >= 0, "a number of at least 0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1] (0 keeps all)"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number above 0 (1 is none)"),
            ("top_logprobs", self.top_logprobs >= 0, "an integer of at least 0"),
            ("prompt_logprobs", _is_count(self.prompt_logprobs), "an integer of at least 0, or None"),
            ("logprobs_of", self.logprobs_of in ("raw", "processed"), "'raw' or 'processed'"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("thinking_budget", (self.thinking_budget or 0) >= 0, "an integer of at least 0, or None"),
            ("top_k", self.top_k >= 0, "an integer of at least 0 (0 keeps all)"),
            ("speculate", self.speculate >= 0, "an integer of at least 0 (0 is plain decoding)"),
        ):
            if not ok:
                raise ValueError(f"SamplingParams.{name}={getattr(self, name)} is not allowed; give {allowed}.")


def _is_count(value: int | None) -> bool:
    """Return whether a number of tokens is None or at least 0; True and False are no numbers."""
    return value is None or (not isinstance(value, bool) and value >= 0)
