"""The server's application: routes and limits around any `AsyncSampler`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from step35.api.sampler import AsyncSampler
from step35.config.serve import ServeSettings
from step35.data.tokenizer import Tokenizer
from step35.serve import admin, anthropic, errors, openai_chat, openai_completions, page, responses
from step35.serve.gate import Gate
from step35.serve.limits import AccessLog, Authorization, BodyLimit
from step35.serve.service import Service
from step35.serve.sse import ClientGone
from step35.serve.telemetry import Telemetry

CLIENT_CLOSED_REQUEST = 499


def create_app(
    sampler: AsyncSampler, tokenizer: Tokenizer, *, model_name: str, settings: ServeSettings | None = None
) -> FastAPI:
    """Return the application; its `state.service.gate` says what is running and takes `draining`."""
    settings = settings or ServeSettings()
    service = Service(sampler, tokenizer, model_name, settings, Gate(settings.max_concurrent), Telemetry(sampler))
    app = FastAPI(title=f"step35: {model_name}", docs_url=None, redoc_url=None, separate_input_output_schemas=False)
    app.state.service = service
    for dialect in (openai_chat, openai_completions, responses, anthropic, admin):
        app.include_router(dialect.router(service))
    app.include_router(page.router())
    errors.install(app)
    app.add_exception_handler(ClientGone, _nobody_listens)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes, seconds=settings.request_timeout_s)
    if settings.api_key:
        app.add_middleware(Authorization, api_key=settings.api_key)
    app.add_middleware(AccessLog, telemetry=service.telemetry)  # added last, so outermost
    return app


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
