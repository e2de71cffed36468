"""A server in front of a fake sampler, on a free loopback port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_sampler import FakeSampler
from server_thread import Server

from step35.cli.shipped import SHIPPED
from step35.config.serve import ServeSettings
from step35.data.tokenizer import Tokenizer


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
