"""A server in front of a fake sampler, on a free loopback port."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fake_sampler import FakeSampler

from step35.cli.shipped import SHIPPED
from step35.config.serve import ServeSettings
from step35.data.tokenizer import Tokenizer
from step35.serve.app import create_app
from step35.serve.server import DrainingServer


class Server:
    """A server in a thread."""

    def __init__(self, sampler: FakeSampler, settings: ServeSettings) -> None:
        self.sampler = sampler
        self.app = create_app(sampler, sampler.tokenizer, model_name="tiny", settings=settings)
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = DrainingServer(self.app, host="127.0.0.1", port=0)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.listener.listen()
        self.thread.start()

    def client(self, key: str = "none") -> openai.OpenAI:
        """Return the official client of this server."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)

    def stop(self) -> None:
        """End the server, running answers included."""
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return the tokenizer of the package's model."""
    return Tokenizer.load(SHIPPED)


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Iterator[Callable[..., Server]]:
    """Return a function from texts to say, and settings, to a running server."""
    servers: list[Server] = []

    def start(*texts: str, stay: bool = False, error: Exception | None = None, **settings: Any) -> Server:
        sampler = FakeSampler(tokenizer, stay=stay, error=error)
        sampler.texts = list(texts) or sampler.texts
        servers.append(Server(sampler, ServeSettings(**settings)))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
