"""A server on a free loopback port, in a thread of the test."""

from __future__ import annotations

import threading
from typing import Any

import openai

from step35.config.serve import ServeSettings
from step35.serve.app import create_app
from step35.serve.server import DrainingServer, listen


class Server:
    """A server in a thread, in front of a sampler that has a tokenizer."""

    def __init__(self, sampler: Any, settings: ServeSettings) -> None:
        self.sampler = sampler
        self.app = create_app(sampler, sampler.tokenizer, model_name="tiny", settings=settings)
        self.listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = DrainingServer(self.app, host="127.0.0.1", port=0)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def client(self, key: str = "none") -> openai.OpenAI:
        """Return the official client of this server."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)

    def stop(self) -> None:
        """End the server, running answers included."""
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
