"""Which requests run in the next pass, and how many positions of each.

All running requests decode in every pass; prompts take what is left of the pass's token budget, chunk by chunk.
When blocks run out, the request that came last gives its own back and waits to be computed again.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from step35.engine.blocks import BLOCK_TOKENS
from step35.engine.kv_cache import PagedCache
from step35.engine.request import Request


class Rows(NamedTuple):
    """Consecutive positions of one request."""

    request: Request
    start: int
    count: int  # type: ignore[assignment]  # a tuple's method of this name is not needed
    depth: int = 0
    """Drafts to make, and to verify behind these positions."""

    @property
    def end(self) -> int:
        """The position behind the last."""
        return self.start + self.count

    @property
    def reach(self) -> int:
        """The position behind the last draft."""
        return self.start + self.count + self.depth


class Scheduler:
    """The queue of those that wait and the list of those that run, in the order of their arrival."""

    def __init__(self, cache: PagedCache, *, max_batch: int, max_pass_tokens: int) -> None:
        self.cache = cache
        self.max_batch = max_batch
        self.max_pass_tokens = max_pass_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.admitting = True
        """When False, nothing new begins; what has begun goes on, preempted requests too."""
        self.preemptions = 0

    def plan(self) -> list[Rows]:
        """Return the rows of the next pass, their blocks reserved, and room for each decoding request's drafts."""
        planned: list[Rows] = []
        budget = self.max_pass_tokens
        for request in list(self.running):
            rows = self._rows(request, budget)
            if budget > 0 and request in self.running and self._make_room(request, rows.reach):
                planned.append(rows)
                budget -= rows.count + rows.depth
        if self.waiting:
            self._admit(planned, budget)
        return planned

    def _admit(self, planned: list[Rows], budget: int) -> None:
        """Begin with requests that wait, as far as the budget and the blocks go."""
        coming = {_next_block(rows.request) for rows in planned} - {None}
        while budget > 0 and self._may_admit():
            request = self.waiting[0]
            self.cache.adopt_prefix(request)
            rows = self._rows(request, budget)
            # What another request is about to compute is waited for instead of computed twice, if it can be of use.
            waits = request.params.prompt_logprobs is None and _next_block(request) in coming
            if waits or not self.cache.reserve(request, rows.reach):
                self.cache.release(request)
                break
            coming |= {_next_block(request)} - {None}
            self.running.append(self.waiting.popleft())
            if not request.generated_count:
                request.cached = request.computed
            planned.append(rows)
            budget -= rows.count + rows.depth

    def finish(self, request: Request) -> None:
        """Forget a request that has ended, wherever it stands, and free its blocks."""
        if request in self.running:
            self.running.remove(request)
            self.cache.release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _may_admit(self) -> bool:
        if not self.waiting or len(self.running) >= self.max_batch:
            return False
        return self.admitting or self.waiting[0].generated_count > 0

    def _make_room(self, request: Request, end: int) -> bool:
        """Reserve blocks up to `end`, taking them from later requests, in the end by waiting itself."""
        while not self.cache.reserve(request, end):
            last = self.running.pop()
            self.cache.release(last)
            self.waiting.appendleft(last)
            self.preemptions += 1
            if last is request:
                return False
        return True

    def _rows(self, request: Request, budget: int) -> Rows:
        """Return what the request runs next, with no drafts while its prompt is being read."""
        depth = request.depth if request.decoding else 0
        return Rows(request, request.computed, min(request.length - request.computed, budget), depth)


def _next_block(request: Request) -> bytes | None:
    """Return the key of the block that the request computes next; None when it is not whole yet."""
    block = request.computed // BLOCK_TOKENS
    return request.key(block) if (block + 1) * BLOCK_TOKENS < request.length else None
