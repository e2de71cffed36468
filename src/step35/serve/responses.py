"""/v1/responses: OpenAI's Responses dialect, without stored state; whole and as a stream of items."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from step35.api.sampling import Grammar
from step35.serve.answer_schema import ResponseObject, answers
from step35.serve.messages import chat_messages
from step35.serve.reading import usage
from step35.serve.response_items import Items
from step35.serve.responses_schema import NamedTool, ResponsesRequest, TextFormat
from step35.serve.service import Service
from step35.serve.sse import Events, respond
from step35.serve.thinking import choose
from step35.serve.turn import Generation, ToolChoice, chat_generation


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None, responses=answers(ResponseObject, stream=True))
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        service.check_model(body.model)
        return await respond(request, ResponseAnswer(service, body), stream=body.stream, named=True)

    return routes


def generation(service: Service, body: ResponsesRequest) -> Generation:
    """Return the turn that a request asks for."""
    named = body.tool_choice if isinstance(body.tool_choice, NamedTool) else None
    mode = body.tool_choice if isinstance(body.tool_choice, str) else "required"
    options = {"max_tokens": body.max_output_tokens, "temperature": body.temperature, "top_p": body.top_p}
    return chat_generation(
        service.tokenizer,
        service.settings,
        chat_messages(body.chat_messages()),
        tools=body.chat_tools(),
        choice=ToolChoice(
            mode=mode, name=named.name if named else None, parallel=body.parallel_tool_calls is not False
        ),
        thinking=choose(service.settings, effort=body.reasoning.effort if body.reasoning else None),
        grammar=grammar(body.text.format),
        options=options,
    )


def grammar(wanted: TextFormat) -> Grammar | None:
    """Return what the answer's text is held to."""
    if wanted.type == "text":
        return None
    return Grammar(json_schema=wanted.schema_ if wanted.schema_ is not None else {"type": "object"})


class ResponseAnswer:
    """The answer to one request, whole or as events."""

    def __init__(self, service: Service, body: ResponsesRequest) -> None:
        self.body, self.items = body, Items()
        self.run = service.run([generation(service, body)])
        self.head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the response once it has ended."""
        response: dict[str, Any] = {}
        async for event in self.events():
            if isinstance(event, dict) and event["type"] in ("response.completed", "response.incomplete"):
                response = event["response"]
        return response

    async def events(self) -> Events:
        """Yield the events as they come, numbered."""
        number, steps = 0, self.run.steps()
        try:
            async for _, step in steps:
                lines = [line for event in step.events for line in self.items.take(event)]
                if number == 0:
                    started = self._response("in_progress")
                    kinds = ("response.created", "response.in_progress")
                    lines = [*({"type": kind, "response": started} for kind in kinds), *lines]
                for line in lines + (self._ending(step.finish_reason) if step.finish_reason else []):
                    yield line | {"sequence_number": number}
                    number += 1
        finally:
            await steps.aclose()

    def _ending(self, finish_reason: str) -> list[dict[str, Any]]:
        status = "incomplete" if finish_reason == "length" else "completed"
        lines = list(self.items.close(status))
        response = self._response(status) | {"output": self.items.output, "usage": self._usage()}
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*lines, {"type": f"response.{status}", "response": response}]

    def _response(self, status: str) -> dict[str, Any]:
        body = self.body
        choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedTool) else body.tool_choice
        return {
            **self.head,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": choice,
            "tools": body.tools,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "usage": None,
        }

    def _usage(self) -> dict[str, Any]:
        counted = usage(self.run.readings)
        return {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"],
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": counted["completion_tokens_details"],
            "total_tokens": counted["total_tokens"],
        }
