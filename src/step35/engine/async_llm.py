"""`AsyncLLM`: one engine for many callers, token by token. Implements `api.AsyncSampler`.

The engine runs in a thread of its own; whatever touches it is a job that this thread does between two passes.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from step35.api.sampler import Update
from step35.api.sampling import SamplingParams
from step35.engine.engine import InFlight
from step35.engine.llm import LLM, update
from step35.engine.request import Request

Result = TypeVar("Result")


class Stream:
    """Where one request's updates go: a queue in the event loop of whoever reads them."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Update | BaseException] = asyncio.Queue()

    def put(self, item: Update | BaseException) -> None:
        """Hand an update, or what went wrong, to the reader; from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the reader's event loop has been closed
            self.request.finish_reason = self.request.finish_reason or "cancelled"


class AsyncLLM:
    """Load a checkpoint folder, or wrap what is in memory; the arguments are those of `LLM`."""

    def __init__(self, path: str | Path | None = None, **options: Any) -> None:
        self._llm = LLM(path, **options)
        self.tokenizer, self._engine = self._llm.tokenizer, self._llm.engine
        self._jobs: deque[Callable[[], None]] = deque()
        self._streams: dict[Request, Stream] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def model(self) -> Any:
        """The module that generates."""
        return self._llm.model

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._engine.max_context

    async def stream(self, prompt: Sequence[int], params: SamplingParams) -> AsyncIterator[Update]:
        """Continue the prompt; closing the iterator, or cancelling the task that reads it, ends the generation."""
        [request] = self._engine.create([prompt], params, stream_text=True)
        stream = Stream(request)
        self._do(lambda: self._start(stream))
        try:
            while True:
                item = await stream.queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if request.finish_reason is None:
                self._do(lambda: self._cancel(request))

    def statistics(self) -> Mapping[str, float]:
        """Return the engine's counters and gauges."""
        return self._engine.statistics()

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probabilities of ids 1..T-1 of each sequence of T ids."""
        return await asyncio.wrap_future(self._call(lambda: self._llm.score(sequences)))

    async def update_weights(self, state: Mapping[str, Any], version: int, in_flight: InFlight = "continue") -> None:
        """Take new weights without a restart; see `Engine.update_weights`. Returns once the engine knows of them."""
        await asyncio.wrap_future(self._call(lambda: self._engine.update_weights(state, version, in_flight)))

    def close(self) -> None:
        """End all generations and the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _call(self, job: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._do(run)
        return future

    def _do(self, job: Callable[[], None]) -> None:
        with self._wake:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._jobs.append(job)
            self._wake.notify()

    def _start(self, stream: Stream) -> None:
        self._streams[stream.request] = stream
        self._engine.add(stream.request)

    def _cancel(self, request: Request) -> None:
        self._streams.pop(request, None)
        self._engine.cancel(request)

    def _work(self) -> None:
        """Do jobs, then a pass, until closed; an error in a pass ends the generations that were part of it."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._jobs or self._engine.busy)
                jobs, self._jobs = self._jobs, deque()
                closed = self._closed
            for job in jobs:
                job()
            if closed:
                self._end_all(RuntimeError("the engine was closed"))
                return
            try:
                for request, new in self._engine.step():
                    self._deliver(request, len(new))
            except Exception as error:
                self._end_all(error)

    def _deliver(self, request: Request, count: int) -> None:
        stream = self._streams.get(request)
        if stream is None:
            return
        stream.put(update(request, count))
        if request.finish_reason is not None:
            del self._streams[request]

    def _end_all(self, error: BaseException) -> None:
        for request, stream in list(self._streams.items()):
            self._cancel(request)
            stream.put(error)
