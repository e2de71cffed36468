"""uvicorn with a graceful end: the first signal stops new work and waits for what is running, the second ends it."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from step35.serve.service import Service

LAST_BYTES_S = 1
"""How long, once no generation runs or the drain has timed out, connections may take to end. Without a limit, a
request whose body never comes, or a client that stopped reading, would hold the server for good."""
KEEP_ALIVE_S = 75
"""How long an idle connection stays open. Clients close theirs after less, 5 s in the official ones: who closes at the
same moment as a client sends loses its request."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raise `OSError` where it cannot.

    It names its protocol, as the sockets of its connections then do: otherwise asyncio leaves them Nagle's algorithm,
    and the second part of an answer waits 40 ms for the client's acknowledgement of the first.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


class DrainingServer(uvicorn.Server):
    """Keeps answering while it drains, /health with a 503, so that a load balancer sees it go."""

    def __init__(self, app: FastAPI, *, host: str, port: int) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        super().__init__(config)
        self.service: Service = app.state.service
        self.drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; on a second signal, leave."""
        if self.drain_until is not None:
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        self.service.gate.draining = True
        self.drain_until = time.monotonic() + self.service.settings.drain_timeout_s

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop, ten times a second."""
        if self.drain_until is not None and (not self.service.gate.active or time.monotonic() > self.drain_until):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the connections, by force those that do not end by themselves."""
        asyncio.get_running_loop().call_later(LAST_BYTES_S, self._hang_up)
        await super().shutdown(sockets)

    def _hang_up(self) -> None:
        """Let every request that is left see its client go: it then ends as it would if that had been so."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def log_to_stderr() -> None:
    """Send the access log, one JSON line a request, and uvicorn's complaints to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (("step35.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False
