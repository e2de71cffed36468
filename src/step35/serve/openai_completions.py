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
    options = body.options() | {"max_tokens": max(1, body.max_tokens), "top_logprobs": body.logprobs or 0}
    echoed = body.logprobs if body.echo else None
    options["prompt_logprobs"] = max((n for n in (echoed, body.prompt_logprobs) if n is not None), default=None)
    found = []
    for ids in prompts(service, body):
        params = sampling_params(options, service.settings, len(ids))
        found += Generation(prompt=tuple(ids), params=params, prompt_only=not body.max_tokens).choices(body.n)
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
        steps, lengths = self.run.steps(), dict[int, int]()
        try:
            async for index, step in steps:
                delta = self._delta(index, step, lengths.get(index))
                lengths[index] = lengths.get(index, 0) + len(delta["text"])
                yield {**self.head, "choices": [delta]}
        finally:
            await steps.aclose()
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield {**self.head, "choices": [], "usage": usage(self.run.readings)}
        yield "[DONE]"

    def _choice(self, index: int, reading: Reading) -> dict[str, Any]:
        prompt, prompt_tops, ids = reading.generation.prompt, reading.prompt_top_logprobs, reading.token_ids
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echo(index) + reading.text,
            "finish_reason": reading.finish_reason,
        }
        if self.body.echo:
            logprobs = [None, *reading.prompt_logprobs, *reading.logprobs]
            tops = [None, *prompt_tops, *reading.top_logprobs] if self.body.logprobs else []
            choice["logprobs"] = self._logprobs([*prompt, *ids], logprobs, tops, 0)
        else:
            choice["logprobs"] = self._logprobs(ids, reading.logprobs, reading.top_logprobs, 0)
        if self.body.prompt_logprobs is not None:
            shown = [pairs[: self.body.prompt_logprobs] for pairs in prompt_tops]
            choice["prompt_logprobs"] = prompt_logprobs(self.tokenizer, prompt, reading.prompt_logprobs, shown)
        if self.body.return_token_ids:
            choice |= {"prompt_token_ids": list(prompt), "token_ids": ids}
        return choice

    def _delta(self, index: int, step: Step, offset: int | None) -> dict[str, Any]:
        """Return what a step brings, behind `offset` characters; None for the first."""
        update, first = step.update, offset is None
        text = self._echo(index) + update.text if first else update.text
        choice = {"index": index, "text": text, "finish_reason": step.finish_reason}
        choice["logprobs"] = self._logprobs(update.token_ids, update.raw_logprobs, update.top_logprobs, offset or 0)
        if self.body.return_token_ids:
            choice["token_ids"] = list(update.token_ids)
            if first:
                choice["prompt_token_ids"] = list(self.run.readings[index].generation.prompt)
        return choice

    def _echo(self, index: int) -> str:
        """Return the prompt's text where it is to stand in front."""
        return self.tokenizer.decode(self.run.readings[index].generation.prompt) if self.body.echo else ""

    def _logprobs(self, ids: Any, logprobs: Any, tops: Any, offset: int) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return text_logprobs(self.tokenizer, ids, logprobs, tops, limit=self.body.logprobs, offset=offset)
