"""One generation as it comes in: its updates become events, and what it amounts to is kept."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from step35.api.sampler import AsyncSampler, TopLogprobs, Update
from step35.data.chat_stream import ContentDelta, Event, ReasoningDelta, ToolCallEnd, TurnParser
from step35.data.tokenizer import Tokenizer
from step35.serve.errors import ApiError
from step35.serve.turn import Generation


@dataclass(frozen=True)
class Step:
    """What one update brought."""

    update: Update
    events: list[Event] = field(default_factory=list)
    finish_reason: str | None = None
    """With the last step: "stop", "length" or "tool_calls"."""


class Reading:
    """Reads one generation and adds up its tokens, their probabilities and its usage."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        self.generation = generation
        self.parser: TurnParser | None = None
        if generation.chat:
            thinking, calls = generation.params.in_thinking, bool(generation.tools)
            self.parser = TurnParser(generation.tools, thinking=thinking, calls=calls)
        self._thinking = generation.chat and generation.params.in_thinking
        self.think_end = tokenizer.id_of("</think>")
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.prompt_logprobs: tuple[float, ...] = ()
        self.prompt_top_logprobs: tuple[TopLogprobs, ...] = ()
        self.text = ""
        self.calls: list[ToolCallEnd] = []
        self.reasoning = self.content = ""
        self.reasoning_tokens = 0
        self.cached_tokens = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.finish_reason: str | None = None

    async def steps(self, sampler: AsyncSampler) -> AsyncGenerator[Step, None]:
        """Yield the steps up to the end; the sampler's stream is closed on every way out."""
        stream = sampler.stream(self.generation.prompt, self.generation.params)
        async with aclosing(cast("AsyncGenerator[Update, None]", stream)):
            async for update in stream:
                yield self.take(update)
                if self.finish_reason:
                    return

    def take(self, update: Update) -> Step:
        """Read one update."""
        if update.finish_reason == "cancelled":
            raise ApiError("the generation was cancelled: the server is shutting down.", status=503)
        if self.generation.prompt_only:
            reason = update.finish_reason and "length"
            update = Update((), (), (), (), text="", finish_reason=reason, completion=update.completion)
        self.token_ids += update.token_ids
        self.logprobs += update.raw_logprobs
        self.top_logprobs += update.top_logprobs
        self.text += update.text
        events = self._parse(update)
        if update.completion:
            self.cached_tokens = update.completion.cached_tokens
            self.prompt_logprobs = update.completion.prompt_logprobs
            self.prompt_top_logprobs = update.completion.prompt_top_logprobs
            self.drafted_tokens = sum(update.completion.drafted)
            self.accepted_tokens = sum(update.completion.accepted)
        if update.finish_reason == "stop" and self.calls:
            self.finish_reason = "tool_calls"
        else:
            self.finish_reason = update.finish_reason
        if self.generation.one_call and self.calls:
            self.finish_reason = "tool_calls"
        return Step(update, events, self.finish_reason)

    def _parse(self, update: Update) -> list[Event]:
        if self.parser is None:
            return []
        events = list(self.parser.feed(update.text))
        if self._thinking:
            ids, closed = update.token_ids, self.think_end in update.token_ids
            self.reasoning_tokens += ids.index(self.think_end) + 1 if closed else len(ids)
            self._thinking = not closed and not self.parser.reasoning_closed  # the text lags behind the tokens
        if update.finish_reason:
            events += self.parser.finish()
        return self._keep(events)

    def _keep(self, events: list[Event]) -> list[Event]:
        """Add the events to the message; drop those after the first call where only one is wanted."""
        for place, event in enumerate(events):
            if isinstance(event, ReasoningDelta):
                self.reasoning += event.text
            elif isinstance(event, ContentDelta):
                self.content += event.text
            elif isinstance(event, ToolCallEnd):
                self.calls.append(event)
                if self.generation.one_call:
                    return events[: place + 1]
        return events


def usage(readings: list[Reading]) -> dict[str, Any]:
    """Return OpenAI's usage object; choices of one request share its prompt.

    Predictions are the drafts of speculation; rejected ones, unlike OpenAI's, are not among the completion's tokens.
    """
    prompt = sum(len(ids) for ids in {reading.generation.prompt for reading in readings})
    completion = sum(len(reading.token_ids) for reading in readings)
    accepted = sum(reading.accepted_tokens for reading in readings)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(prompt, max(reading.cached_tokens for reading in readings))},
        "completion_tokens_details": {
            "reasoning_tokens": sum(reading.reasoning_tokens for reading in readings),
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(reading.drafted_tokens for reading in readings) - accepted,
        },
    }
