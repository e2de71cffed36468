"""Forward passes over rows of many requests at once: the trunk, and the MTP modules that draft.

Rows of all requests lie one behind the other, so that every product is one for all; attention alone goes request by
request, those with equally many rows together, over the slots that each may see.
"""

# N rows of the pass  D model

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from step35.config.cost import active_parameters
from step35.engine.compiled.program import Program
from step35.engine.graphs import MOST_ROWS, Graphs, Work
from step35.engine.kv_cache import PagedCache
from step35.engine.paged_context import PagedContext
from step35.engine.request import Request
from step35.engine.sampling import Scores
from step35.engine.scheduler import Rows
from step35.model.step35 import Step35

FEW_ROWS = 128
"""Up to this many rows of one request run compiled, fewer where `FEW_PRODUCTS` says so."""
FEW_PRODUCTS = 10**9
"""Rows of one request, times the parameters that each uses, beyond which torch is faster: its products are, and what
it takes besides no longer counts (on a CPU with AVX512-BF16, torch takes over from 50 rows of `mini` on)."""
FAR = 4096
"""From this position on, only rows that decode: torch attends to far more keys than weights are read."""

Pass = Callable[[Sequence[int], Sequence[Rows]], Tensor]
"""From the tokens of rows and the rows to states (N, D)."""


class Runner:
    """The model, and the cache it reads and writes.

    On a CPU, requests with few rows run in the compiled program where there is one: all that decode, and short prompts.
    Long prompts run in torch, whose matrix products are faster for many rows. On a GPU, decoding passes are captured.
    """

    graphs_on = ("cuda",)
    """Types of device on which passes that decode run as graphs."""

    def __init__(self, model: Step35, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.program = Program.create(model, cache)
        self.few_rows = min(FEW_ROWS, max(MOST_ROWS, FEW_PRODUCTS // active_parameters(model.config)))
        self.graphs = Graphs(cache) if cache.device.type in self.graphs_on else None

    def in_order(self, rows: Iterable[Rows]) -> list[Rows]:
        """Return rows as passes want them: what runs compiled first, then requests with equally many together."""
        return sorted(rows, key=lambda r: (not self._few(r), r.count))

    def trunk(self, rows: Sequence[Rows], picked: Sequence[int]) -> tuple[Tensor, Scores]:
        """Run the trunk; return its last layer's output (N, D) before the final norm, and the scores of some rows."""
        program = self.program
        if program is not None and self.graphs is None and all(map(self._few, rows)):
            return program.trunk(_tokens(rows), rows, picked)
        compiled = None if program is None else lambda tokens, few: program.trunk(tokens, few)[0]
        h_ND = self._split("trunk", self._trunk, compiled, rows, 0)
        if not picked:
            return h_ND, Scores(h_ND[:0], [], [])
        return h_ND, self.logits(h_ND if len(picked) == len(h_ND) else h_ND[picked])

    def module(self, k: int, rows: Sequence[Rows]) -> Tensor:
        """Run MTP module k; return its output (N, D). Its row at position p reads the token at p and the state at p-1.

        Its first state belongs to position k+1; before that, nothing is visible.
        """
        compiled = None if self.program is None else partial(self.program.module, k)
        return self._split(f"module {k}", partial(self._module, k), compiled, rows, k + 1)

    def logits(self, h_ND: Tensor) -> Scores:
        """Return the logits of the trunk's outputs (N, D)."""
        return self.program.logits(h_ND) if self.program is not None else Scores.of(self.model.logits(h_ND))

    def draft(self, requests: Sequence[Request]) -> None:
        """Let module after module propose a token behind what is known and proposed so far, up to `Request.depth`.

        Each first catches up on the slots whose tokens were not known, or wrongly guessed, when it last ran.
        """
        if self.program is not None and not any(r.behind > self.few_rows for r in requests):
            for request, drafts in zip(requests, self.program.draft(requests), strict=True):
                request.drafts = drafts
            return
        for k in range(max(r.depth for r in requests)):
            rows = [Rows(r, r.module_done[k], r.length + k - r.module_done[k]) for r in requests if r.depth > k]
            rows = self.in_order(rows)
            last = [end - 1 for end in accumulate(r.count for r in rows)]
            ends_ND = self.module(k, rows)[last].to(self.cache.dtype)
            for r, token in zip(rows, self.model.mtp[k].logits(ends_ND).argmax(-1).tolist(), strict=True):
                r.request.drafts.append(token)

    def _split(self, name: str, work: Work, compiled: Pass | None, rows: Sequence[Rows], first: int) -> Tensor:
        """Run the requests with few rows compiled or captured, which come first, and the others as they are."""
        few = sum(map(self._few, rows)) if compiled is not None else 0
        if self.graphs is not None:
            compiled, few = partial(self.graphs.run, name, work, first), sum(r.count <= MOST_ROWS for r in rows)
        parts, rest = list[Tensor](), rows[few:]
        if compiled is not None and few:
            parts.append(compiled(_tokens(rows[:few]), rows[:few]))
        if rest:
            states_ND = work(self._ids(rest), PagedContext(self.cache, rest, first))
            parts.append(states_ND.to(parts[0].dtype) if parts else states_ND)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _few(self, rows: Rows) -> bool:
        return rows.count <= (self.few_rows if rows.end <= FAR else min(self.few_rows, MOST_ROWS))

    def _trunk(self, ids_1N: Tensor, context: PagedContext) -> Tensor:
        h_ND = self.model.trunk(ids_1N, context)[0]
        if self.cache.hidden:
            self.cache.hidden[0].index_copy_(0, context.slots("window"), h_ND)
        return h_ND

    def _module(self, k: int, ids_1N: Tensor, context: PagedContext) -> Tensor:
        before_ND = self.cache.hidden[k][context.slots("window", back=1)]
        h_ND: Tensor = self.model.mtp[k](self.model.embed(ids_1N), before_ND[None], context)[0]
        self.cache.hidden[k + 1].index_copy_(0, context.slots("window"), h_ND)
        return h_ND

    def _ids(self, rows: Sequence[Rows]) -> Tensor:
        return torch.tensor([_tokens(rows)], device=self.cache.device)


def _tokens(rows: Sequence[Rows]) -> list[int]:
    """Return the tokens of all rows: known ones, then drafts."""
    tokens: list[int] = []
    for r in rows:
        known = r.request.tokens[r.start : r.end]
        ahead = max(0, r.start - r.request.length)
        tokens += known + r.request.drafts[ahead : ahead + r.count - len(known)]
    return tokens
