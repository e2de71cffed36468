"""The routes around the generating ones: models, tokens, health and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from step35.data import chat
from step35.serve.answer_schema import Health, ModelCard, ModelList, Text, Tokens, answers
from step35.serve.messages import chat_messages, check_tools
from step35.serve.openai_schema import DetokenizeRequest, TokenizeRequest
from step35.serve.service import Service


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    card = {"id": service.model_name, "object": "model", "created": service.created, "owned_by": "step35"}
    card |= {"max_model_len": service.settings.max_context}

    @routes.get("/v1/models", responses=answers(ModelList))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @routes.get("/v1/models/{name:path}", responses=answers(ModelCard))
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card

    @routes.post("/tokenize", responses=answers(Tokens))
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        ids = tokens(service, body)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.settings.max_context}

    @routes.post("/detokenize", responses=answers(Text))
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        service.check_ids(body.tokens, "tokens")
        text = service.tokenizer.decode(body.tokens)
        return {"text": text, "prompt": text}

    @routes.get("/health", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> Response:
        draining = service.gate.draining
        state = {"status": "draining" if draining else "ok", "running": service.gate.active}
        return JSONResponse(state, status_code=503 if draining else 200)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.telemetry.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return routes


def tokens(service: Service, body: TokenizeRequest) -> list[int]:
    """Return the ids of a text as it is, or of a conversation up to the next assistant turn."""
    if body.messages is None:
        return service.tokenizer.encode(body.text if body.text is not None else body.prompt or "")
    check_tools(body.tools or ())
    return chat.encode_prompt(service.tokenizer, chat_messages(body.messages), body.tools)
