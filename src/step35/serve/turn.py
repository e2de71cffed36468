"""What all dialects share: messages, tools and options become a prompt and sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from step35.api.messages import Message, ToolSchema
from step35.api.sampling import Grammar, SamplingParams
from step35.config.serve import ServeSettings
from step35.data import chat
from step35.data.tokenizer import Tokenizer
from step35.serve.errors import ApiError
from step35.serve.messages import check_tools
from step35.serve.thinking import CLOSED_BLOCK, Thinking

FORBID = -100.0
"""Bias that keeps a token from being chosen."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation to make, and how to read it."""

    prompt: tuple[int, ...]
    params: SamplingParams
    tools: tuple[ToolSchema, ...] = ()
    """What may be called; without any, what looks like a call is text, as in other servers."""
    chat: bool = False
    """Whether the answer is an assistant turn, to be parsed, or plain text."""
    one_call: bool = False
    """End after the first tool call."""
    prompt_only: bool = False
    """Only the prompt is of interest: what is generated is dropped."""

    def choices(self, n: int) -> list[Generation]:
        """Return `n` of them, each with a random stream of its own."""
        if self.params.seed is None:
            return [self] * n
        return [replace(self, params=replace(self.params, seed=self.params.seed + index)) for index in range(n)]


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """What the turn may call: `mode` is auto, none or required; `name` narrows required to one tool."""

    mode: str = "auto"
    name: str | None = None
    parallel: bool = True


def chat_generation(
    tokenizer: Tokenizer,
    settings: ServeSettings,
    messages: Sequence[Message],
    *,
    tools: Sequence[ToolSchema] = (),
    choice: ToolChoice | None = None,
    thinking: Thinking | None = None,
    grammar: Grammar | None = None,
    options: Mapping[str, Any],
) -> Generation:
    """Return the next assistant turn of a conversation; raise `ApiError` for what cannot be served."""
    choice = choice or ToolChoice()
    check_tools(tools)
    thinking = (thinking or Thinking()).left(messages, tokenizer)
    prompt = prompt_ids(tokenizer, messages, tools, thinking)
    called = required_tools(tools, choice)
    if called and grammar:
        raise ApiError("tool_choice asks for a call, response_format for JSON text; drop one.", param="response_format")
    options = dict(options)
    if choice.mode == "none" and tools:
        options["logit_bias"] = {**options.get("logit_bias", {}), tokenizer.id_of("<tool_call>"): FORBID}
    options.update(
        grammar=Grammar(tools=called) if called else grammar,
        in_thinking=thinking.enabled,
        thinking_budget=thinking.budget if thinking.enabled else None,
    )
    params = sampling_params(options, settings, len(prompt))
    callable_tools = () if choice.mode == "none" else tuple(tools)
    return Generation(
        prompt=tuple(prompt), params=params, tools=callable_tools, chat=True, one_call=not choice.parallel
    )


def prompt_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[ToolSchema], thinking: Thinking
) -> list[int]:
    """Return the ids to continue from, with an empty think block when the turn is not to think."""
    ids = chat.encode_prompt(tokenizer, messages, tools or None)
    return ids if thinking.enabled else ids + tokenizer.encode(CLOSED_BLOCK)


def required_tools(tools: Sequence[ToolSchema], choice: ToolChoice) -> tuple[ToolSchema, ...]:
    """Return the tools of which one must be called; empty when a call is not asked for."""
    if choice.mode != "required":
        return ()
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise ApiError("tool_choice asks for a call, but there are no tools; give tools.", param="tool_choice")
    if choice.name is not None and choice.name not in names:
        raise ApiError(
            f"tool_choice names '{choice.name}', which is no tool here; tools: {', '.join(names)}.",
            param="tool_choice",
        )
    return tuple(tool for tool in tools if choice.name in (None, tool["function"]["name"]))


def sampling_params(options: Mapping[str, Any], settings: ServeSettings, prompt_tokens: int) -> SamplingParams:
    """Fill in what the request left open; raise `ApiError` for values out of range and prompts that are too long."""
    given = {name: value for name, value in options.items() if value is not None}
    given.setdefault("max_tokens", settings.default_max_tokens)
    given.setdefault("speculate", settings.speculate or 0)
    if settings.max_context is not None:
        room = settings.max_context - prompt_tokens
        if room < 1:
            raise ApiError(
                f"the prompt has {prompt_tokens} tokens; prompt and answer together may have {settings.max_context}. "
                "Shorten the conversation.",
                param="messages",
                code="context_length_exceeded",
            )
        given["max_tokens"] = min(given["max_tokens"], room)
    try:
        return SamplingParams(**given)
    except ValueError as error:
        raise ApiError(str(error)) from None
