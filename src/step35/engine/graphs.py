"""Decoding on a GPU: passes over few rows, captured as CUDA graphs and replayed without Python between kernels.

What such a pass reads lies in one tensor of numbers that is filled anew before every replay: a grid of R requests with
T rows each, their positions and slots, and the slots that they see. All three sizes are rounded up, so that few graphs
serve every pass; a cell without a row writes to a slot that nobody reads. Elsewhere than on a GPU the same passes run
uncaptured, which is how they are tested.
"""

# N rows of the pass  R requests  T rows a request  S visible slots

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from step35.engine.blocks import BLOCK_TOKENS
from step35.engine.kv_cache import PagedCache
from step35.engine.paged_context import PagedContext, View
from step35.engine.scheduler import Rows
from step35.model.context import Context

MOST_ROWS = 8
"""Rows of a request in a grid, at most: a token and its drafts, or what a module catches up on."""
LEAST_SLOTS = 256
"""Slots of full layers that even the smallest grid sees."""

Work = Callable[[Tensor, PagedContext], Tensor]
"""From ids (1, N) and their context to states (N, D); also keeps what later passes read."""


class Shape(NamedTuple):
    """The size of a grid, and the first position that holds anything."""

    requests: int
    rows: int
    slots: int
    first: int

    @classmethod
    def holding(cls, rows: Sequence[Rows], first: int) -> Shape:
        """Return the smallest of the shapes in use that holds these rows."""
        most, furthest = max(r.count for r in rows), max(r.end for r in rows)
        slots = _power_of_two(max(LEAST_SLOTS, furthest))
        return cls(_power_of_two(len(rows)), _power_of_two(most), slots, first)


class GridContext(PagedContext):
    """The context of a grid, of tensors only."""

    def __init__(self, cache: PagedCache, numbers: dict[str, Tensor]) -> None:
        Context.__init__(self, numbers["positions"].view(1, -1))
        requests, rows = numbers["ids"].shape
        self.cache, self.shapes = cache, [(requests, rows)]
        self._slots = {
            ("full", 0): numbers["full"].flatten(),
            ("window", 0): numbers["window"].flatten(),
            ("window", 1): numbers["before"].flatten(),
        }
        self._views = {
            (0, window): View(*(numbers[f"{what} {kind}"].to(dtype) for what, dtype in _SEEN))
            for kind, window in (("full", None), ("window", cache.window_tokens))
        }


_SEEN = (("seen", torch.int64), ("first", torch.int32), ("last", torch.int32))


class Shared:
    """What the graphs of one engine have in common: memory, and a stream on which they are captured."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.pool: Any = torch.cuda.graph_pool_handle()
            self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]


class Graphs:
    """One graph for each work and shape, captured when it is first needed."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self._graphs: dict[tuple[str, Shape], Graph] = {}
        self._shared = Shared(cache.device) if cache.device.type == "cuda" else None

    def run(self, name: str, work: Work, first: int, tokens: Sequence[int], rows: Sequence[Rows]) -> Tensor:
        """Return the states (N, D) of `work`, known by `name`, over the rows; nothing lies before position `first`."""
        shape = Shape.holding(rows, first)
        numbers, real = fill(self.cache, shape, tokens, rows)
        graph = self._graphs.get((name, shape))
        if graph is None:
            graph = self._graphs[name, shape] = Graph(self.cache, work, shape)
            if self._shared is not None:
                graph.capture(numbers, self._shared)
        states_ND = graph.replay(numbers)
        return states_ND[real.to(states_ND.device)]


class Graph:
    """One work at one shape."""

    def __init__(self, cache: PagedCache, work: Work, shape: Shape) -> None:
        self.cache, self.work, self.shape = cache, work, shape
        self.numbers = torch.zeros(sum(map(prod, sizes(cache, shape).values())), dtype=torch.int64, device=cache.device)
        self._captured: torch.cuda.CUDAGraph | None = None
        self._states_ND: Tensor | None = None

    def capture(self, numbers: Tensor, shared: Shared) -> None:
        """Record the work; first it runs on these numbers, since libraries must have run before."""
        self.numbers.copy_(numbers)
        with torch.cuda.device(self.cache.device):
            shared.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(shared.stream):
                self._run()
            torch.cuda.current_stream().wait_stream(shared.stream)
            self._captured = torch.cuda.CUDAGraph()
            how = {"pool": shared.pool, "stream": shared.stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self._captured, **how):
                self._states_ND = self._run()

    def replay(self, numbers: Tensor) -> Tensor:
        """Return the states of all cells, which the next replay overwrites."""
        self.numbers.copy_(numbers)
        if self._captured is None:
            return self._run()
        with torch.cuda.device(self.cache.device):
            self._captured.replay()
        assert self._states_ND is not None
        return self._states_ND

    def _run(self) -> Tensor:
        tables = sizes(self.cache, self.shape)
        flat = torch.split(self.numbers, [prod(size) for size in tables.values()])
        parts = {name: part.view(size) for (name, size), part in zip(tables.items(), flat, strict=True)}
        return self.work(parts["ids"].view(1, -1), GridContext(self.cache, parts))


def sizes(cache: PagedCache, shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the tables of numbers that a grid has, each with its size."""
    cells = shape.requests, shape.rows
    slots = ("full", "window", "before")  # a cell's own slots, and the sliding one of the position before
    spans = ("first full", "last full", "first window", "last window")
    return {
        **dict.fromkeys(("ids", "positions", *slots, *spans), cells),
        "seen full": (shape.requests, shape.slots),
        "seen window": (shape.requests, cache.window_tokens + shape.rows),
    }


def fill(cache: PagedCache, shape: Shape, tokens: Sequence[int], rows: Sequence[Rows]) -> tuple[Tensor, Tensor]:
    """Return the numbers of a grid that holds these rows, and the cells in which they are."""
    start, end = np.zeros((2, shape.requests, 1), np.int64)
    start[: len(rows), 0], end[: len(rows), 0] = [r.start for r in rows], [r.end for r in rows]
    positions = start + np.arange(shape.rows)
    real = positions < end
    positions = np.minimum(positions, np.maximum(end - 1, 0))
    tables = {kind: _table([getattr(r.request, kind) for r in rows], shape.requests) for kind in ("full", "window")}

    def slots(kind: str, places: np.ndarray, valid: np.ndarray) -> np.ndarray:
        blocks = np.take_along_axis(tables[kind], np.where(valid, places // BLOCK_TOKENS, 0), axis=1)
        return np.where(valid, blocks * BLOCK_TOKENS + places % BLOCK_TOKENS, cache.spare[kind])

    numbers = {name: np.zeros(size, np.int64) for name, size in sizes(cache, shape).items()}
    numbers["ids"][real] = tokens
    numbers["positions"][:] = positions
    numbers["before"][:] = slots("window", positions - 1, real & (positions > 0))
    for kind, window in (("full", None), ("window", cache.window_tokens)):
        from_ = np.maximum(start - window + 1, shape.first) if window else np.full_like(start, shape.first)
        seen = from_ + np.arange(numbers[f"seen {kind}"].shape[1])
        last = np.maximum(positions - from_, 0)
        numbers[kind][:] = slots(kind, positions, real)
        numbers[f"seen {kind}"][:] = slots(kind, seen, seen < end)
        numbers[f"last {kind}"][:] = last
        numbers[f"first {kind}"][:] = np.maximum(last - window + 1, 0) if window else 0
    flat = np.concatenate([part.ravel() for part in numbers.values()])
    return torch.from_numpy(flat), torch.from_numpy(np.flatnonzero(real))


def _table(tables: Sequence[Sequence[int]], requests: int) -> np.ndarray:
    """Return block tables side by side, padded with zeros."""
    blocks = np.zeros((requests, max(map(len, tables))), np.int64)
    for row, table in enumerate(tables):
        blocks[row, : len(table)] = table
    return blocks


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
