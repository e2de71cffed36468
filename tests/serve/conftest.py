"""A sampler that says what it is told to, and a server in front of it on a free loopback port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from step35.api.sampler import Completion, Update
from step35.api.sampling import SamplingParams
from step35.cli.shipped import SHIPPED
from step35.config.serve import ServeSettings
from step35.data.tokenizer import StreamDecoder, Tokenizer
from step35.serve.app import create_app
from step35.serve.server import DrainingServer


@dataclass
class FakeSampler:
    """Answers with `texts` in turn, a token at a time; `stay` keeps it from ending."""

    tokenizer: Tokenizer
    texts: list[str] = field(default_factory=lambda: ["Hm.\n</think>\nHello"])
    stay: bool = False
    error: Exception | None = None
    prompts: list[str] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)

    async def stream(self, prompt: Sequence[int], params: SamplingParams) -> AsyncIterator[Update]:
        """Say the next text."""
        if self.error:
            raise self.error
        text = self.texts[len(self.prompts) % len(self.texts)]
        self.prompts.append(self.tokenizer.decode(prompt))
        self.params.append(params)
        end = self.tokenizer.id_of("<|im_end|>")
        ids, decoder = (*self.tokenizer.encode(text), end), StreamDecoder(self.tokenizer)
        cut = len(ids) > params.max_tokens
        ids = ids[: params.max_tokens]
        try:
            for place, token in enumerate(ids):
                last = place == len(ids) - 1 and not self.stay
                top = ((((token, -0.5), (0, -2.0))[: params.top_logprobs]),) if params.top_logprobs else ()
                piece = "" if token == end else decoder.push(token)
                reason = ("length" if cut else "stop") if last else None
                whole = Completion(ids, (-0.5,) * len(ids), reason, cached_tokens=2) if reason else None
                yield Update((token,), (-0.4,), (-0.5,), top, piece, reason, whole)
                self.started.set()
                await asyncio.sleep(0)
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    def statistics(self) -> Mapping[str, float]:
        """Return one number."""
        return {"cache_tokens": 7.0}


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
