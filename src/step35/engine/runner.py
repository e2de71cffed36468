"""Forward passes over a batch with a cache: prefill, decode, and the MTP modules' drafts.

Buffers are indexed by position: `tokens` (known ones, then drafts) and `hidden[0]` (the trunk before its final
norm), `hidden[k]` (output of MTP module k-1). A pass reads and writes windows of them.
"""

# B batch  T new tokens  S slots  D model  V vocab

from __future__ import annotations

import torch
from torch import Tensor

from step35.engine.kv_cache import DenseCache
from step35.model.context import Context
from step35.model.step35 import Step35


class Runner:
    """State of one batch of sequences inside the model."""

    def __init__(self, model: Step35, prompts: list[list[int]], slots: int, depth: int) -> None:
        weight = model.embed_tokens.weight
        self.model, self.depth, self.slots = model, depth, slots
        dtype = model.compute_dtype or weight.dtype
        self.cache = DenseCache(model.config, len(prompts), slots, dtype, weight.device, mtp=depth > 0)
        self.tokens_BS = torch.zeros(len(prompts), slots, dtype=torch.long, device=weight.device)
        for row, prompt in enumerate(prompts):
            self.tokens_BS[row, : len(prompt)] = torch.tensor(prompt, device=weight.device)
        size = (len(prompts), slots, model.config.hidden_size)
        self.hidden = [torch.zeros(size, dtype=dtype, device=weight.device) for _ in range(depth + 1 if depth else 0)]
        self.draft_rows = slots  # the first draft runs over the whole prompt

    def prefill(self, lengths: list[int]) -> Tensor:
        """Run the prompts, a common prefix only once; return the next-token logits (B, V)."""
        shared = self._common_prefix(min(lengths))
        if shared:
            self._trunk(torch.arange(shared, device=self.tokens_BS.device)[None])
            self.cache.share_first(shared)
            for hidden in self.hidden[:1]:
                hidden[1:, :shared] = hidden[:1, :shared]
        positions_BT = torch.arange(shared, max(lengths), device=self.tokens_BS.device).expand(len(lengths), -1)
        h_BTD = self._trunk(positions_BT)
        last_B = torch.tensor(lengths, device=h_BTD.device) - 1 - shared
        return self.model.logits(h_BTD[torch.arange(len(lengths)), last_B])

    def decode(self, lengths: list[int], drafts: int) -> Tensor:
        """Run each sequence's last known token and `drafts` drafted ones; return logits (B, 1 + drafts, V)."""
        start_B1 = torch.tensor(lengths, device=self.tokens_BS.device)[:, None] - 1
        return self.model.logits(self._trunk(start_B1 + torch.arange(1 + drafts, device=start_B1.device)))

    def draft(self, lengths: list[int]) -> Tensor:
        """Return `depth` drafted tokens a sequence (B, depth), and place them behind the known ones.

        Module k runs over a window that ends at the last position whose trunk state is known. The window reaches
        back over everything that one pass may accept; rows computed from a draft that was then rejected lie within
        it, so that every module's cache always equals a pass over the whole prefix.
        """
        known_B1 = torch.tensor(lengths, device=self.tokens_BS.device)[:, None]
        longest = int(known_B1.max()) - 1
        for k, module in enumerate(self.model.mtp[: self.depth]):
            rows = min(self.draft_rows, longest)
            positions_BT = (known_B1 - 2 - torch.arange(rows - 1, -1, -1, device=known_B1.device)).clamp(min=0)
            row_B1 = torch.arange(len(known_B1), device=known_B1.device)[:, None]
            embedding = self.model.embed(self.tokens_BS[row_B1, positions_BT + 1 + k])
            state = module(embedding, self.hidden[k][row_B1, positions_BT], self._context(positions_BT))
            self.hidden[k + 1][row_B1, positions_BT] = state
            self.tokens_BS[row_B1, known_B1 + k] = module.logits(state[:, -1:]).argmax(-1)
        self.draft_rows = self.depth + 1
        return self.tokens_BS[torch.arange(len(known_B1))[:, None], known_B1 + torch.arange(self.depth)]

    def append(self, row: int, position: int, tokens: list[int]) -> None:
        """Record newly known tokens of sequence `row` from `position` on."""
        self.tokens_BS[row, position : position + len(tokens)] = torch.tensor(tokens, device=self.tokens_BS.device)

    def keep(self, rows: list[int]) -> None:
        """Drop finished sequences."""
        index = torch.tensor(rows, device=self.tokens_BS.device)
        self.cache.keep(index)
        self.tokens_BS = self.tokens_BS[index]
        self.hidden = [hidden[index] for hidden in self.hidden]

    def _trunk(self, positions_BT: Tensor) -> Tensor:
        row_B1 = torch.arange(len(positions_BT), device=positions_BT.device)[:, None]
        h_BTD = self.model.trunk(self.tokens_BS[row_B1, positions_BT], self._context(positions_BT))
        if self.hidden:
            self.hidden[0][row_B1, positions_BT] = h_BTD
        return h_BTD

    def _context(self, positions_BT: Tensor) -> Context:
        return Context(positions_BT, cache=self.cache, key_positions_BS=self.cache.begin(positions_BT))

    def _common_prefix(self, shortest: int) -> int:
        """Return how many leading tokens all prompts share, leaving each at least one of its own."""
        if len(self.tokens_BS) == 1:
            return 0
        same = (self.tokens_BS[:, : shortest - 1] == self.tokens_BS[:1, : shortest - 1]).all(0)
        return int(same.long().cumprod(0).sum())
