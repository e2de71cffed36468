"""A forward pass of the model over rows of many requests, whose earlier keys and values lie in a `PagedCache`."""

# N rows of the pass  R requests  T rows a request  S visible slots  K kv heads  C head dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from step35.config.model import LayerConfig
from step35.engine.blocks import BLOCK_TOKENS
from step35.engine.kv_cache import PagedCache
from step35.engine.scheduler import Rows
from step35.model.attention_flex import BLOCK, LEAST_HEAD, attend_flex, block_mask
from step35.model.attention_kernels import attend
from step35.model.compiled.attention import attend_spans
from step35.model.compiled.library import fits
from step35.model.context import Context


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

    @cached_property
    def blocks(self) -> BlockMask:
        return block_mask(self.first_RT, self.last_RT, self.slots_RS.shape[1])


class PagedContext(Context):
    """A forward pass whose keys and values lie in a `PagedCache`; one row of N tokens to the model."""

    flex_on = ("cuda",)
    """Types of device on which chunks of prompts go through FlexAttention."""

    def __init__(self, cache: PagedCache, rows: Sequence[Rows], first: int) -> None:
        device = cache.device
        positions = [p for r in rows for p in range(r.start, r.end)]
        super().__init__(torch.tensor([positions], device=device))
        self.cache, self.rows, self.first = cache, rows, first
        self._slots: dict[tuple[str, int], Tensor] = {}
        self._views: dict[tuple[int, int | None], View] = {}
        self.groups = [list(group) for _, group in groupby(rows, key=lambda r: r.count)]
        self.shapes = [(len(group), group[0].count) for group in self.groups]

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
        for number, (requests, count) in enumerate(self.shapes):
            rows = requests * count
            q = q_BTHC[0, done : done + rows].view(requests, count, *q_BTHC.shape[2:])
            view = self._view(number, layer.window)
            k, v = (store[layer.index][view.slots_RS] for store in (self.cache.keys, self.cache.values))
            if fits(q):
                y = attend_spans(q, k, v, view.first_RT, view.last_RT)
            elif count >= BLOCK and layer.head_dim >= LEAST_HEAD and q.device.type in self.flex_on:
                y = attend_flex(q, k, v, view.blocks)
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
