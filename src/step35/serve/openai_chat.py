"""/v1/chat/completions: a request becomes generations; their events become chunks or one whole answer."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from step35.api.sampling import Grammar
from step35.data.chat_stream import ContentDelta, Event, ReasoningDelta, ToolCallEnd, ToolCallStart
from step35.serve.answer_schema import ChatCompletion, answers
from step35.serve.logprobs import chat_logprobs
from step35.serve.messages import chat_messages
from step35.serve.openai_schema import ChatRequest, NamedChoice, ResponseFormat
from step35.serve.reading import Reading, Step, usage
from step35.serve.service import Run, Service
from step35.serve.sse import Events, respond
from step35.serve.thinking import choose
from step35.serve.turn import Generation, ToolChoice, chat_generation


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None, responses=answers(ChatCompletion, stream=True))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        return await respond(request, ChatAnswer(service, body), stream=body.stream)

    return routes


def generation(service: Service, body: ChatRequest) -> Generation:
    """Return the turn that a request asks for."""
    options = body.options()
    options["max_tokens"] = body.max_completion_tokens or body.max_tokens
    if body.logprobs:
        options["top_logprobs"] = body.top_logprobs or 0
    thinking = choose(
        service.settings,
        enabled=body.thinking_enabled(),
        effort=body.reasoning_effort,
        budget=body.thinking_budget,
    )
    return chat_generation(
        service.tokenizer,
        service.settings,
        chat_messages(body.messages),
        tools=[tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
        choice=tool_choice(body),
        thinking=thinking,
        grammar=grammar(body.response_format),
        options=options,
    )


def tool_choice(body: ChatRequest) -> ToolChoice:
    """Return what the turn may call."""
    parallel = body.parallel_tool_calls is not False
    if isinstance(body.tool_choice, NamedChoice):
        return ToolChoice(mode="required", name=body.tool_choice.function.name, parallel=parallel)
    return ToolChoice(mode=body.tool_choice or "auto", parallel=parallel)


def grammar(wanted: ResponseFormat | None) -> Grammar | None:
    """Return what the answer's text is held to."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is not None and wanted.type == "json_schema":
        return Grammar(json_schema=wanted.json_schema.schema_)
    return Grammar(json_schema={"type": "object"})


class ChatAnswer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.tokenizer, self.body = service.tokenizer, body
        self.run: Run = service.run(generation(service, body).choices(body.n))
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model_name}
        self.call_ids: dict[tuple[int, int], str] = {}

    async def whole(self) -> dict[str, Any]:
        """Return the answer once all choices have ended."""
        async for _ in self.run.steps():
            pass
        readings = self.run.readings
        choices = [self._choice(index, reading) for index, reading in enumerate(readings)]
        answer = {**self.head, "object": "chat.completion", "choices": choices, "usage": usage(readings)}
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = list(readings[0].generation.prompt)
        return answer

    async def events(self) -> Events:
        """Yield the chunks as they come, then usage if asked for, then the end mark."""
        steps, begun = self.run.steps(), set[int]()
        try:
            async for index, step in steps:
                if index not in begun:
                    begun.add(index)
                    yield self._opening(index)
                for chunk in self._step_chunks(index, step):
                    yield chunk
        finally:
            await steps.aclose()
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield self._chunk([]) | {"usage": usage(self.run.readings)}
        yield "[DONE]"

    def _choice(self, index: int, reading: Reading) -> dict[str, Any]:
        choice = {
            "index": index,
            "message": self._message(index, reading),
            "logprobs": self._logprobs(reading.token_ids, reading.logprobs, reading.top_logprobs),
            "finish_reason": reading.finish_reason,
        }
        return choice | ({"token_ids": reading.token_ids} if self.body.return_token_ids else {})

    def _message(self, index: int, reading: Reading) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reading.content or None}
        message["reasoning_content"] = reading.reasoning or None
        if reading.calls:
            message["tool_calls"] = [self._call(index, call) for call in reading.calls]
        elif message["content"] is None:
            message["content"] = ""
        return message

    def _call(self, index: int, call: ToolCallEnd) -> dict[str, Any]:
        function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
        return {"id": self._call_id(index, call.index), "type": "function", "function": function}

    def _call_id(self, choice: int, call: int) -> str:
        return self.call_ids.setdefault((choice, call), f"call_{uuid.uuid4().hex[:24]}")

    def _opening(self, index: int) -> dict[str, Any]:
        chunk = self._chunk([_delta(index, {"role": "assistant", "content": ""})])
        if self.body.return_token_ids:
            chunk["prompt_token_ids"] = list(self.run.readings[index].generation.prompt)
        return chunk

    def _step_chunks(self, index: int, step: Step) -> list[dict[str, Any]]:
        """Return one chunk for each event; probabilities, ids and the finish reason go with the last of them."""
        choices = [_delta(index, self._event(index, event)) for event in step.events]
        update, extra = step.update, dict[str, Any]()
        if self.body.logprobs:
            extra["logprobs"] = self._logprobs(update.token_ids, update.raw_logprobs, update.top_logprobs)
        if self.body.return_token_ids:
            extra["token_ids"] = list(update.token_ids)
        if step.finish_reason:
            choices.append(_delta(index, {}) | {"finish_reason": step.finish_reason})
        elif extra and not choices:
            choices.append(_delta(index, {}))
        if choices:
            choices[-1] |= extra
        return [self._chunk([choice]) for choice in choices]

    def _event(self, index: int, event: Event) -> dict[str, Any]:
        if isinstance(event, ReasoningDelta):
            return {"reasoning_content": event.text}
        if isinstance(event, ContentDelta):
            return {"content": event.text}
        if isinstance(event, ToolCallStart):
            head = {"id": self._call_id(index, event.index), "type": "function"}
            return {"tool_calls": [{"index": event.index, **head, "function": {"name": event.name, "arguments": ""}}]}
        arguments = json.dumps(event.arguments, ensure_ascii=False)
        return {"tool_calls": [{"index": event.index, "function": {"arguments": arguments}}]}

    def _logprobs(self, ids: Any, logprobs: Any, tops: Any) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(self.tokenizer, ids, logprobs, tops, self.body.top_logprobs or 0)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": choices}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": None}
