"""Forward passes over rows of many requests at once: the trunk, and the MTP modules that draft.

Rows of all requests lie one behind the other, so that every product is one for all; attention alone goes request by
request, those with equally many rows together, over the slots that each may see.
"""

# N rows of the pass  D model

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from step35.config.cost import active_parameters
from step35.engine.compiled.program import Program
from step35.engine.graphs import MOST_ROWS, Graphs, Work
from step35.engine.kv_cache import PagedCache
from step35.engine.paged_context import PagedContext
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


class Runner:
    """The model, and the cache it reads and writes.

    On a CPU, requests with few rows run in the compiled program where there is one: all that decode, and short prompts.
    Long prompts run in torch, whose matrix products are faster for many rows. On a GPU, decoding passes are captured.
    """

    graphs_on = ("cuda",)
    """Types of device on which passes that decode run as graphs."""

    def __init__(self, model: Step35, cache: PagedCache, draft_vocabulary: int) -> None:
        self.model, self.cache, self.draft_vocabulary = model, cache, draft_vocabulary
        self.program = Program.create(model, cache, draft_vocabulary)
        self.few_rows = min(FEW_ROWS, max(MOST_ROWS, FEW_PRODUCTS // active_parameters(model.config)))
        self.graphs = Graphs(cache) if cache.device.type in self.graphs_on else None

    def in_order(self, rows: Iterable[Rows]) -> list[Rows]:
        """Return rows as passes want them: what runs compiled first, then requests with equally many together."""
        ordered = list(rows)
        if len(ordered) > 1:
            ordered.sort(key=lambda r: (not self._few(r), r.count + r.depth))
        return ordered

    def run(self, rows: Sequence[Rows]) -> tuple[Tensor, Scores]:
        """Make the drafts that are asked for, then run the trunk over all rows and over these.

        Returns the trunk's output (N, D) before the final norm, and where all known tokens of a request have run, the
        scores of the last of them and of its drafts.
        """
        few = self._compiled(rows)
        if self.program is None or not few:
            return self._run(rows)
        if few == len(rows):
            return self.program.run(rows)
        parts = [self.program.run(rows[:few]), self._run(rows[few:])]
        return torch.cat([h_ND for h_ND, _ in parts]), Scores.join([scores for _, scores in parts])

    def module(self, k: int, rows: Sequence[Rows]) -> Tensor:
        """Run MTP module k; return its output (N, D). Its row at position p reads the token at p and the state at p-1.

        Its first state belongs to position k+1; before that, nothing is visible.
        """
        parts, few = list[Tensor](), self._compiled(rows)
        if self.program is not None and few:
            parts.append(self.program.module(k, _tokens(rows[:few]), rows[:few]))
        if few < len(rows):
            parts.append(self._pass(f"module {k}", partial(self._module, k), rows[few:], k + 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def logits(self, h_ND: Tensor) -> Scores:
        """Return the logits of the trunk's outputs (N, D)."""
        return self.program.logits(h_ND) if self.program is not None else Scores.of(self.model.logits(h_ND))

    def _run(self, rows: Sequence[Rows]) -> tuple[Tensor, Scores]:
        """Do what `run` does, in torch."""
        self._draft([r for r in rows if r.depth])
        h_ND = self._pass("trunk", self._trunk, [Rows(r.request, r.start, r.count + r.depth) for r in rows], 0)
        picked, done = list[int](), 0
        for r in rows:
            done += r.count + r.depth
            if r.end == r.request.length:
                picked += range(done - r.depth - 1, done)
        if not picked:
            return h_ND, Scores(torch.empty(0, self.model.config.vocab_size, device=h_ND.device), [], [])
        return h_ND, self.logits(h_ND if len(picked) == len(h_ND) else h_ND[picked])

    def _draft(self, planned: Sequence[Rows]) -> None:
        """Let module after module propose a token behind what is known and proposed so far, up to `Rows.depth`.

        Each first catches up on the slots whose tokens were not known, or wrongly guessed, when it last ran.
        """
        for r in planned:
            r.request.drafts = []
        for k in range(max((r.depth for r in planned), default=0)):
            starts = [(r.request, r.request.module_done[k]) for r in planned if r.depth > k]
            rows = self.in_order(Rows(request, start, request.length + k - start) for request, start in starts)
            last = [end - 1 for end in accumulate(r.count for r in rows)]
            ends_ND = self.module(k, rows)[last].to(self.cache.dtype)
            logits_NV = self.model.mtp[k].logits(ends_ND)[:, : self.draft_vocabulary]
            for r, token in zip(rows, logits_NV.argmax(-1).tolist(), strict=True):
                r.request.drafts.append(token)

    def _pass(self, name: str, work: Work, rows: Sequence[Rows], first: int) -> Tensor:
        """Run rows in torch; where graphs are captured, requests with few rows, which come first, in one."""
        few = sum(r.count <= MOST_ROWS for r in rows) if self.graphs is not None else 0
        parts, rest = list[Tensor](), rows[few:]
        if self.graphs is not None and few:
            parts.append(self.graphs.run(name, work, first, _tokens(rows[:few]), rows[:few]))
        if rest:
            parts.append(work(self._ids(rest), PagedContext(self.cache, rest, first)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _compiled(self, rows: Sequence[Rows]) -> int:
        """Return how many of the rows, which are in order, run compiled."""
        return 0 if self.program is None else sum(map(self._few, rows))

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
