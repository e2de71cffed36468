"""What the routes stand on: runs generations side by side, within the limits, and measures them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field

from step35.api.sampler import AsyncSampler
from step35.config.serve import ServeSettings
from step35.data.tokenizer import Tokenizer
from step35.serve.errors import ApiError
from step35.serve.gate import Gate
from step35.serve.reading import Reading, Step
from step35.serve.telemetry import Telemetry
from step35.serve.turn import Generation

QUEUED_STEPS = 64
"""Steps that wait for a slow client; then the sampler is no longer read."""

Item = tuple[int, Step | Exception | None]
"""Index of a generation, and its next step, its failure, or None at its end."""


@dataclass
class Service:
    """A sampler with its tokenizer, limits and metrics."""

    sampler: AsyncSampler
    tokenizer: Tokenizer
    model_name: str
    settings: ServeSettings
    gate: Gate
    telemetry: Telemetry
    created: int = field(default_factory=lambda: int(time.time()))

    def run(self, generations: Sequence[Generation]) -> Run:
        """Return the generations, ready to run."""
        return Run(self, [Reading(generation, self.tokenizer) for generation in generations])

    def check_model(self, name: str | None) -> None:
        """Raise a 404 for another model than the one that is served."""
        if name not in (None, self.model_name):
            raise ApiError(
                f"model '{name}' is not served here; use '{self.model_name}'.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def check_ids(self, ids: Iterable[int], param: str) -> None:
        """Raise a 400 for a token id that is not in the vocabulary."""
        vocabulary = self.tokenizer.vocab_size
        if bad := [token for token in ids if not 0 <= token < vocabulary]:
            raise ApiError(f"token id {bad[0]} is not in the vocabulary, 0 to {vocabulary - 1}.", param=param)


@dataclass
class Run:
    """The generations of one request."""

    service: Service
    readings: list[Reading]

    async def steps(self) -> AsyncGenerator[tuple[int, Step], None]:
        """Yield the steps of all generations as they come, each with the index of its generation.

        Raises what a generation raises, and a 504 at the time limit. Closing it ends all generations.
        """
        deadline = time.monotonic() + self.service.settings.request_timeout_s
        queue = asyncio.Queue[Item](QUEUED_STEPS)
        with self.service.gate.hold(len(self.readings)):
            tasks = [asyncio.create_task(self._pump(index, queue)) for index in range(len(self.readings))]
            try:
                running = len(tasks)
                while running:
                    index, item = await self._next(queue, deadline)
                    if isinstance(item, Exception):
                        raise item
                    if item is None:
                        running -= 1
                    else:
                        yield index, item
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._count_tokens()

    async def _pump(self, index: int, queue: asyncio.Queue[Item]) -> None:
        """Read one generation into the queue."""
        last, telemetry, started = 0.0, self.service.telemetry, time.monotonic()
        stream = self.readings[index].steps(self.service.sampler)
        try:
            async for step in stream:
                now = time.monotonic()
                if not last:
                    telemetry.first_token.observe(now - started)
                else:
                    for _ in step.update.token_ids:
                        telemetry.next_token.observe((now - last) / len(step.update.token_ids))
                last = now
                await queue.put((index, step))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))
        finally:
            await stream.aclose()

    async def _next(self, queue: asyncio.Queue[Item], deadline: float) -> Item:
        try:
            async with asyncio.timeout(
                deadline - time.monotonic()
            ):  # wait_for of Python 3.11 can swallow a cancellation
                return await queue.get()
        except TimeoutError:
            seconds = self.service.settings.request_timeout_s
            raise ApiError(
                f"the answer took longer than {seconds:g} s; ask for fewer tokens.", status=504, code="timeout"
            ) from None

    def _count_tokens(self) -> None:
        tokens = self.service.telemetry.tokens
        for reading in self.readings:
            tokens.labels("prompt").inc(len(reading.generation.prompt))
            tokens.labels("cached").inc(reading.cached_tokens)
            tokens.labels("generated").inc(len(reading.token_ids))
