"""Forward passes over rows of many requests at once: the trunk, and the MTP modules that draft.

Rows of all requests lie one behind the other, so that every product is one for all; attention alone goes request by
request, those with equally many rows together, over the slots that each may see.
"""

# N rows of the pass  R requests  T rows a request  S visible slots  K kv heads  C head dim  D model

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, groupby

import torch
from torch import Tensor

from step35.config.model import LayerConfig
from step35.engine.blocks import BLOCK_TOKENS
from step35.engine.compiled.program import Program
from step35.engine.kv_cache import PagedCache
from step35.engine.request import Request
from step35.engine.sampling import Scores
from step35.engine.scheduler import Rows
from step35.model.attention_kernels import attend
from step35.model.compiled.attention import attend_spans
from step35.model.compiled.library import fits
from step35.model.context import Context
from step35.model.step35 import Step35

FEW_ROWS = 128
"""Up to this many rows of one request run compiled; for more, torch is at times faster (measured on AVX-512)."""
FAR = 4096
"""From this position on, a 16th as many: torch attends to far more keys than weights are read."""

Pass = Callable[[Sequence[Rows]], Tensor]


@dataclass
class View:
    """The slots that one group of requests reads in one kind of layer."""

    slots_RS: Tensor
    first_RT: Tensor
    """The first and the last of them that each query sees, int32."""
    last_RT: Tensor

    @cached_property
    def mask_RTS(self) -> Tensor:
        place_S = torch.arange(self.slots_RS.shape[1], device=self.slots_RS.device)
        return (place_S >= self.first_RT[..., None]) & (place_S <= self.last_RT[..., None])


class PagedContext(Context):
    """A forward pass whose keys and values lie in a `PagedCache`; one row of N tokens to the model."""

    def __init__(self, cache: PagedCache, rows: Sequence[Rows], first: int) -> None:
        device = cache.device
        positions = [p for r in rows for p in range(r.start, r.end)]
        super().__init__(torch.tensor([positions], device=device))
        self.cache, self.rows, self.first = cache, rows, first
        self._slots: dict[tuple[str, int], Tensor] = {}
        self._views: dict[tuple[int, int | None], View] = {}
        self.groups = [list(group) for _, group in groupby(rows, key=lambda r: r.count)]

    def slots(self, kind: str, back: int = 0) -> Tensor:
        """Return the slot of every row (N,), or of the position `back` before it."""
        if (kind, back) not in self._slots:
            slots = [slot(r, p - back, kind) for r in self.rows for p in range(r.start, r.end)]
            self._slots[kind, back] = torch.tensor(slots, device=self.positions_BT.device)
        return self._slots[kind, back]

    def attend(self, layer: LayerConfig, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
        """Store the new keys and values, then attend over all that each row may see; returns (1, N, H, C)."""
        kind = "full" if layer.window is None else "window"
        self.cache.write(layer, self.slots(kind), k_BTKC[0], v_BTKC[0])
        outputs, done = [], 0
        for number, group in enumerate(self.groups):
            rows = len(group) * group[0].count
            q = q_BTHC[0, done : done + rows].view(len(group), -1, *q_BTHC.shape[2:])
            view = self._view(number, layer.window)
            k, v = (store[layer.index][view.slots_RS] for store in (self.cache.keys, self.cache.values))
            if fits(q):
                y = attend_spans(q, k, v, view.first_RT, view.last_RT)
            else:
                y = attend(q, k, v, view.mask_RTS)
            outputs.append(y.flatten(0, 1))
            done += rows
        return torch.cat(outputs)[None]

    def _view(self, group: int, window: int | None) -> View:
        if (group, window) not in self._views:
            self._views[group, window] = self._build_view(self.groups[group], window)
        return self._views[group, window]

    def _build_view(self, group: list[Rows], window: int | None) -> View:
        """Lay the visible slots of each request side by side, padded behind the last."""
        device = self.positions_BT.device
        starts = [max(self.first, r.start - window + 1) if window else self.first for r in group]
        longest = max(r.end - start for r, start in zip(group, starts, strict=True))
        tables = torch.stack([_slots_of(r, start, longest, window) for r, start in zip(group, starts, strict=True)])
        last_RT = torch.tensor([r.start - start for r, start in zip(group, starts, strict=True)], device=device)
        last_RT = last_RT[:, None] + torch.arange(group[0].count, device=device)
        first_RT = (last_RT - window + 1).clamp(min=0) if window else torch.zeros_like(last_RT)
        return View(tables.to(device), first_RT.int(), last_RT.int())


def slot(rows: Rows, position: int, kind: str) -> int:
    """Return where the request keeps `position`."""
    table = rows.request.full if kind == "full" else rows.request.window
    return table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


def _slots_of(rows: Rows, start: int, count: int, window: int | None) -> Tensor:
    """Return the slots of `count` positions from `start` on; those past the request's blocks point anywhere."""
    table = rows.request.full if window is None else rows.request.window
    first = start // BLOCK_TOKENS
    blocks = torch.tensor(table[first : -(-(start + count) // BLOCK_TOKENS)].tolist())
    slots = (blocks[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()[start - first * BLOCK_TOKENS :]
    return torch.nn.functional.pad(slots[:count], (0, max(0, count - len(slots))))


class Runner:
    """The model, and the cache it reads and writes.

    Requests with few rows run in the compiled program where there is one: all that decode, and short prompts. Long
    prompts run in torch, whose matrix products are faster for many rows.
    """

    def __init__(self, model: Step35, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.program = Program.create(model, cache)

    def trunk(self, rows: Sequence[Rows]) -> Tensor:
        """Run the trunk; return its last layer's output (N, D) before the final norm."""
        return self._split(rows, self._compiled_trunk, self._eager_trunk)

    def module(self, k: int, rows: Sequence[Rows]) -> Tensor:
        """Run MTP module k; return its output (N, D). Its row at position p reads the token at p and the state at p-1.

        Its first state belongs to position k+1; before that, nothing is visible.
        """
        return self._split(rows, partial(self._compiled_module, k), partial(self._eager_module, k))

    def logits(self, h_ND: Tensor) -> Scores:
        """Return the logits of the trunk's outputs (N, D)."""
        return self.program.logits(h_ND) if self.program is not None else Scores.of(self.model.logits(h_ND))

    def draft(self, requests: Sequence[Request]) -> None:
        """Let module after module propose a token behind what is known and proposed so far, up to `Request.depth`.

        Each first catches up on the slots whose tokens were not known, or wrongly guessed, when it last ran.
        """
        if self.program is not None and not any(r.behind > FEW_ROWS for r in requests):
            for request, drafts in zip(requests, self.program.draft(requests), strict=True):
                request.drafts = drafts
            return
        for k in range(max(r.depth for r in requests)):
            rows = [Rows(r, r.module_done[k], r.length + k - r.module_done[k]) for r in requests if r.depth > k]
            rows = in_order(rows)
            last = [end - 1 for end in accumulate(r.count for r in rows)]
            ends_ND = self.module(k, rows)[last].to(self.cache.dtype)
            for r, token in zip(rows, self.model.mtp[k].logits(ends_ND).argmax(-1), strict=True):
                r.request.drafts.append(int(token))

    def _split(self, rows: Sequence[Rows], compiled: Pass, eager: Pass) -> Tensor:
        """Run the requests with few rows compiled, which come first, and the others in torch."""
        few = sum(_few(r) for r in rows) if self.program is not None else 0
        parts = [run(part) for run, part in ((compiled, rows[:few]), (eager, rows[few:])) if part]
        return parts[0] if len(parts) == 1 else torch.cat([parts[0], parts[1].float()])

    def _compiled_trunk(self, rows: Sequence[Rows]) -> Tensor:
        assert self.program is not None
        return self.program.trunk(_tokens(rows), rows)

    def _compiled_module(self, k: int, rows: Sequence[Rows]) -> Tensor:
        assert self.program is not None
        return self.program.module(k, _tokens(rows), rows)

    def _eager_trunk(self, rows: Sequence[Rows]) -> Tensor:
        context = PagedContext(self.cache, rows, 0)
        h_ND = self.model.trunk(self._ids(rows), context)[0]
        if self.cache.hidden:
            self.cache.hidden[0].index_copy_(0, context.slots("window"), h_ND)
        return h_ND

    def _eager_module(self, k: int, rows: Sequence[Rows]) -> Tensor:
        module = self.model.mtp[k]
        context = PagedContext(self.cache, rows, k + 1)
        before_ND = self.cache.hidden[k][context.slots("window", back=1)]
        state: Tensor = module(self.model.embed(self._ids(rows)), before_ND[None], context)[0]
        self.cache.hidden[k + 1].index_copy_(0, context.slots("window"), state)
        return state

    def _ids(self, rows: Sequence[Rows]) -> Tensor:
        return torch.tensor([_tokens(rows)], device=self.cache.device)


def in_order(rows: Iterable[Rows]) -> list[Rows]:
    """Return rows as passes want them: what runs compiled first, then requests with equally many together."""
    return sorted(rows, key=lambda r: (not _few(r), r.count))


def _few(rows: Rows) -> bool:
    return rows.count <= (FEW_ROWS if rows.end <= FAR else FEW_ROWS // 16)


def _tokens(rows: Sequence[Rows]) -> list[int]:
    """Return the tokens of all rows: known ones, then drafts."""
    tokens: list[int] = []
    for r in rows:
        known = r.request.tokens[r.start : r.end]
        ahead = max(0, r.start - r.request.length)
        tokens += known + r.request.drafts[ahead : ahead + r.count - len(known)]
    return tokens
