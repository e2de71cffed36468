"""What every request passes on its way in: the access log, authorization and the limit of the body.

Plain ASGI, so that streams and disconnects pass through untouched. The log has no prompts, answers or keys.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from step35.serve.errors import ApiError
from step35.serve.telemetry import Telemetry

OPEN_PATHS = ("/", "/health")
ACCESS_LOG = logging.getLogger("step35.serve.access")


class AccessLog:
    """Logs one JSON line a request, counts it, and gives it an id."""

    def __init__(self, app: ASGIApp, *, telemetry: Telemetry) -> None:
        self.app, self.telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and log how it ended."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # what nginx logs for a client that went away
        request_id = uuid.uuid4().hex

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self.telemetry.requests.labels(route, str(status)).inc()
            ACCESS_LOG.info(_line(scope, request_id, status, time.perf_counter() - started))


def _line(scope: Scope, request_id: str, status: int, seconds: float) -> str:
    entry: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": request_id,
        "client": (scope.get("client") or ("",))[0],
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(seconds * 1000, 1),
    }
    return json.dumps(entry)


class Authorization:
    """Turns away requests without the key, as a bearer token or in `x-api-key`."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it may come in."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response(scope["path"])(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode(), self.api_key.encode())


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, announced or not, and those that take longer than `seconds`."""

    def __init__(self, app: ASGIApp, *, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with a body that is counted as it is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        problem = f"the body is longer than {self.limit} bytes; shorten it."
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self.limit:
            await ApiError(problem, status=413).response(scope["path"])(scope, receive, send)
            return
        read, complete, deadline = 0, False, asyncio.get_running_loop().time() + self.seconds

        async def count() -> Message:
            nonlocal read, complete
            try:
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self.seconds:g} s.") from None
            complete = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self.limit:
                raise HTTPException(413, problem)
            return message

        await self.app(scope, count, send)
