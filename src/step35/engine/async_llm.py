"""`AsyncLLM`: one engine for many callers, token by token. Implements `api.AsyncSampler`.

The engine runs in a thread of its own; whatever touches it is a job that this thread does between two passes.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
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
Item = Update | BaseException


class Stream:
    """One request's updates on their way to the event loop of whoever reads them; those not yet read become one."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self._news: Item | None = None
        self._there = asyncio.Event()

    def put(self, item: Item) -> None:
        """Hand an update, or what went wrong, to the reader; in its event loop."""
        old, self._news = self._news, item
        if isinstance(old, Update) and isinstance(item, Update):
            self._news = old.and_then(item)
        self._there.set()

    async def get(self) -> Item:
        """Wait for what has not been read yet."""
        await self._there.wait()
        self._there.clear()
        news, self._news = self._news, None
        assert news is not None
        return news


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
                item = await stream.get()
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
                self._deliver(self._engine.step())
            except Exception as error:
                self._end_all(error)

    def _deliver(self, news: Sequence[tuple[Request, list[int]]]) -> None:
        """Send the updates of a pass to their readers."""
        items = list[tuple[Stream, Item]]()
        for request, new in news:
            if stream := self._streams.get(request):
                items.append((stream, update(request, len(new))))
                if request.finish_reason is not None:
                    del self._streams[request]
        _send(items)

    def _end_all(self, error: BaseException) -> None:
        streams = list(self._streams.values())
        for stream in streams:
            self._cancel(stream.request)
        _send([(stream, error) for stream in streams])


def _send(items: Sequence[tuple[Stream, Item]]) -> None:
    """Hand items to their streams, waking each event loop once."""
    by_loop = defaultdict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]](list)
    for stream, item in items:
        by_loop[stream.loop].append((stream, item))
    for loop, part in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, part)
        except RuntimeError:  # the readers' event loop has been closed
            for stream, _ in part:
                stream.request.finish_reason = stream.request.finish_reason or "cancelled"


def _put_all(items: Sequence[tuple[Stream, Item]]) -> None:
    for stream, item in items:
        stream.put(item)
