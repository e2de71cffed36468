"""/v1/completions: texts or token ids in, texts (and token ids) out."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from step35.serve.answer_schema import TextCompletion, answers
from step35.serve.errors import ApiError
from step35.serve.logprobs import prompt_logprobs, text_logprobs
from step35.serve.openai_schema import CompletionRequest
from step35.serve.reading import Reading, Step, usage
from step35.serve.service import Service
from step35.serve.sse import Events, respond
from step35.serve.turn import Generation, sampling_params


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=None, responses=answers(TextCompletion, stream=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        return await respond(request, TextAnswer(service, body), stream=body.stream)

    return routes


def prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    """Return the token ids of each prompt; raise `ApiError` for empty prompts and unknown ids."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    found = [service.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in given]
    if not found or not all(found):
        raise ApiError("a prompt is empty; give at least one token.", param="prompt")
    for ids in found:
        service.check_ids(ids, "prompt")
    return found


def generations(service: Service, body: CompletionRequest) -> list[Generation]:
    """Return `n` generations for each prompt, those of one prompt side by side."""
    options = body.options() | {"max_tokens": body.max_tokens, "top_logprobs": body.logprobs or 0}
    options["prompt_logprobs"] = body.prompt_logprobs is not None
    found = []
    for ids in prompts(service, body):
        params = sampling_params(options, service.settings, len(ids))
        found += Generation(prompt=tuple(ids), params=params).choices(body.n)
    return found


class TextAnswer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self.tokenizer, self.body = service.tokenizer, body
        self.run = service.run(generations(service, body))
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the answer once all choices have ended."""
        async for _ in self.run.steps():
            pass
        readings = self.run.readings
        choices = [self._choice(index, reading) for index, reading in enumerate(readings)]
        return {**self.head, "choices": choices, "usage": usage(readings)}

    async def events(self) -> Events:
        """Yield the chunks as they come, then usage if asked for, then the end mark."""
        steps, lengths = self.run.steps(), [0] * len(self.run.readings)
        try:
            async for index, step in steps:
                yield {**self.head, "choices": [self._delta(index, step, lengths[index])]}
                lengths[index] += len(step.update.text)
        finally:
            await steps.aclose()
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield {**self.head, "choices": [], "usage": usage(self.run.readings)}
        yield "[DONE]"

    def _choice(self, index: int, reading: Reading) -> dict[str, Any]:
        choice = {"index": index, "text": reading.text, "finish_reason": reading.finish_reason}
        choice["logprobs"] = self._logprobs(reading.token_ids, reading.logprobs, reading.top_logprobs, 0)
        if self.body.prompt_logprobs is not None:
            prompt = reading.generation.prompt
            choice["prompt_logprobs"] = prompt_logprobs(self.tokenizer, prompt, reading.prompt_logprobs)
        if self.body.return_token_ids:
            choice |= {"prompt_token_ids": list(reading.generation.prompt), "token_ids": reading.token_ids}
        return choice

    def _delta(self, index: int, step: Step, offset: int) -> dict[str, Any]:
        update = step.update
        choice = {"index": index, "text": update.text, "finish_reason": step.finish_reason}
        choice["logprobs"] = self._logprobs(update.token_ids, update.raw_logprobs, update.top_logprobs, offset)
        if self.body.return_token_ids:
            choice["token_ids"] = list(update.token_ids)
            if not offset:
                choice["prompt_token_ids"] = list(self.run.readings[index].generation.prompt)
        return choice

    def _logprobs(self, ids: Any, logprobs: Any, tops: Any, offset: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return text_logprobs(self.tokenizer, ids, logprobs, tops, limit=self.body.logprobs, offset=offset)
