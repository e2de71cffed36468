"""/v1/messages: the Anthropic dialect, whole and as a stream of content blocks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from step35.api.sampling import Grammar
from step35.data.chat_stream import ContentDelta, Event, ReasoningDelta, ToolCallStart
from step35.serve.answer_schema import AnthropicErrorAnswer, MessageObject, TokenCount, answers
from step35.serve.anthropic_schema import CountRequest, MessagesRequest, openai_messages, openai_tools
from step35.serve.messages import chat_messages
from step35.serve.reading import Reading
from step35.serve.service import Service
from step35.serve.sse import Events, respond
from step35.serve.thinking import choose
from step35.serve.turn import Generation, ToolChoice, chat_generation

MODES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post(
        "/v1/messages",
        response_model=None,
        responses=answers(MessageObject, stream=True, errors=AnthropicErrorAnswer),
    )
    async def messages(body: MessagesRequest, request: Request) -> Response:
        service.check_model(body.model)
        return await respond(request, MessageAnswer(service, body), stream=body.stream, named=True)

    @routes.post("/v1/messages/count_tokens", responses=answers(TokenCount, errors=AnthropicErrorAnswer))
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        return {"input_tokens": len(generation(service, body, {}).prompt)}

    return routes


def generation(service: Service, body: CountRequest, options: dict[str, Any]) -> Generation:
    """Return the turn that a request asks for."""
    choice, thinking, output = body.tool_choice, body.thinking, body.output_config
    effort = output.effort if output and output.effort in ("low", "medium", "high") else None
    return chat_generation(
        service.tokenizer,
        service.settings,
        chat_messages(openai_messages(body)),
        tools=openai_tools(body.tools),
        choice=ToolChoice(mode=MODES[choice.type], name=choice.name, parallel=not choice.disable_parallel_tool_use)
        if choice
        else None,
        thinking=choose(
            service.settings,
            enabled=thinking.type != "disabled" if thinking else None,
            effort=effort,
            budget=thinking.budget_tokens if thinking else None,
        ),
        grammar=Grammar(json_schema=output.format.schema_) if output and output.format else None,
        options=options,
    )


def sampling_options(body: MessagesRequest) -> dict[str, Any]:
    """Return the sampling parameters of a request."""
    return {
        "max_tokens": body.max_tokens,
        "stop": tuple(body.stop_sequences),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
    }


class MessageAnswer:
    """The answer to one request, whole or as events."""

    def __init__(self, service: Service, body: MessagesRequest) -> None:
        self.service, self.body = service, body
        self.run = service.run([generation(service, body, sampling_options(body))])
        self.head = {"id": f"msg_{uuid.uuid4().hex[:24]}", "type": "message", "role": "assistant"}
        self.head["model"] = service.model_name

    @property
    def reading(self) -> Reading:
        """The one generation."""
        return self.run.readings[0]

    async def whole(self) -> dict[str, Any]:
        """Return the message once it has ended."""
        async for _ in self.run.steps():
            pass
        return {**self.head, "content": self._content(), **self._stop(), "usage": self._usage()}

    async def events(self) -> Events:
        """Yield the events of a message as it comes."""
        steps, blocks, begun = self.run.steps(), Blocks(), False
        try:
            async for _, step in steps:
                if not begun:
                    begun = True
                    empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
                    yield {"type": "message_start", "message": {**self.head, **empty, "usage": self._usage()}}
                for event in step.events:
                    for line in blocks.take(event):
                        yield line
        finally:
            await steps.aclose()
        for line in blocks.close():
            yield line
        yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def _content(self) -> list[dict[str, Any]]:
        reading, content = self.reading, list[dict[str, Any]]()
        if reading.reasoning:
            content.append({"type": "thinking", "thinking": reading.reasoning, "signature": ""})
        if reading.content:
            content.append({"type": "text", "text": reading.content})
        for call in reading.calls:
            content.append({"type": "tool_use", "id": call_id(), "name": call.name, "input": call.arguments})
        return content

    def _stop(self) -> dict[str, Any]:
        """Return why the message ended; a stop text is known by the token before it, which is no end token."""
        reading = self.reading
        reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
        reason, sequence = reasons.get(reading.finish_reason or "", "end_turn"), None
        ended = reading.token_ids and reading.token_ids[-1] in self.service.tokenizer.eos_ids
        if reason == "end_turn" and self.body.stop_sequences and not ended:
            text = self.service.tokenizer.decode(reading.token_ids)
            found = [stop for stop in self.body.stop_sequences if stop in text]
            sequence = min(found, key=text.index, default=None)
            reason = "stop_sequence" if sequence else reason
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, int]:
        reading = self.reading
        return {
            "input_tokens": len(reading.generation.prompt) - reading.cached_tokens,
            "cache_read_input_tokens": reading.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": len(reading.token_ids),
        }


class Blocks:
    """Turns the events of a turn into content blocks that open and close one after the other."""

    def __init__(self) -> None:
        self.index = -1
        self.kind = ""

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield what one event brings."""
        if isinstance(event, ReasoningDelta):
            yield from self._open("thinking", {"thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": event.text})
        elif isinstance(event, ContentDelta):
            yield from self._open("text", {"text": ""})
            yield self._delta({"type": "text_delta", "text": event.text})
        elif isinstance(event, ToolCallStart):
            yield from self.close()
            yield from self._open("tool_use", {"id": call_id(), "name": event.name, "input": {}})
        else:
            arguments = json.dumps(event.arguments, ensure_ascii=False)
            yield self._delta({"type": "input_json_delta", "partial_json": arguments})
            yield from self.close()

    def close(self) -> Iterator[dict[str, Any]]:
        """Yield the end of the open block, if there is one."""
        if self.kind:
            self.kind = ""
            yield {"type": "content_block_stop", "index": self.index}

    def _open(self, kind: str, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if kind == self.kind:
            return
        yield from self.close()
        self.kind = kind
        self.index += 1
        yield {"type": "content_block_start", "index": self.index, "content_block": {"type": kind, **fields}}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self.index, "delta": delta}


def call_id() -> str:
    """Return a fresh id of a tool call."""
    return f"toolu_{uuid.uuid4().hex[:24]}"
