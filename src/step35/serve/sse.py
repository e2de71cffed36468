"""Answers that end with their client: server-sent events, and whole answers raced against a disconnect."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from step35.serve.errors import INTERNAL, as_api_error

T = TypeVar("T")
Events = AsyncGenerator[dict[str, Any] | str, None]
"""Payloads of the events: objects, sent as JSON, or texts, sent as they are."""

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """The client closed its connection before there was an answer."""


class Answer(Protocol):
    """The answer to one request; only one of the two is asked for."""

    async def whole(self) -> dict[str, Any]:
        """Return it once it has ended."""
        ...

    def events(self) -> Events:
        """Yield it as it comes."""
        ...


async def respond(request: Request, answer: Answer, *, stream: bool, named: bool = False) -> Response:
    """Return the answer, streamed or whole; `named` events carry their type in a line of its own."""
    if stream:
        return EventStream(await primed(request, answer.events()), named=named, path=request.url.path)
    return JSONResponse(await with_client(request, answer.whole()))


async def with_client(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it and raise `ClientGone` as soon as the client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancel(gone)
        await _cancel(task)


async def primed(request: Request, events: Events) -> Events:
    """Wait for the first event, so that a request which cannot be served still gets its status; then stream."""
    try:
        first = await with_client(request, anext(events))  # type: ignore[arg-type]
    except BaseException:
        await events.aclose()
        raise
    return _resumed(first, events)


async def _resumed(first: dict[str, Any] | str, events: Events) -> Events:
    try:
        yield first
        async for event in events:
            yield event
    finally:
        await events.aclose()


class EventStream(Response):
    """Server-sent events; a client that goes away closes `events` at once."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, *, named: bool = False, path: str = "") -> None:
        self.events, self.named, self.path = events, named, path
        self.status_code, self.background = 200, None
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end of the events or of the connection."""
        sender, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sender, gone), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        except OSError:  # the connection broke while writing
            pass
        finally:
            await _cancel(gone)
            await _cancel(sender)
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self.events:
                await send({"type": "http.response.body", "body": self._line(event), "more_body": True})
        except Exception as error:
            if isinstance(error, OSError):
                raise
            shown = as_api_error(error)
            if shown.code == INTERNAL:
                logging.getLogger("step35.serve").error("a stream failed", exc_info=error)
            body = self._line(shown.body(self.path))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _line(self, event: dict[str, Any] | str) -> bytes:
        if isinstance(event, str):
            return f"data: {event}\n\n".encode()
        name = f"event: {event.get('type', 'error')}\n" if self.named else ""
        return f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """End `task` and wait until it has cleaned up."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
