"""Paged keys and values: blocks of tokens for full layers, and others for sliding layers, freed behind the window.

A slot belongs to a position, and holds what depends on tokens up to that position alone. For the trunk that is the
position's own key and value. MTP module k at trunk position t has seen token t+1+k, so its state lies in slot t+1+k:
a prefix shared by several sequences is then valid for the modules too. Beside keys and values, sliding blocks hold
the hidden states that the next module reads: `hidden[0]` of the trunk, `hidden[k+1]` of module k.
"""

# N rows  K kv heads  C head dim  D model

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from step35.config.model import LayerConfig, ModelConfig
from step35.engine.blocks import BLOCK_TOKENS, NOWHERE, BlockPool
from step35.engine.request import Request


class PagedCache:
    """Two pools of blocks and the tensors behind them, one slot a token; and `spare`, a slot for no token."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        full_blocks: int,
        window_blocks: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.full, self.window = BlockPool(full_blocks), BlockPool(window_blocks)
        self.layers = config.layers()
        self.window_tokens = max((layer.window or 0 for layer in self.layers), default=0)
        slots = [BLOCK_TOKENS * (full_blocks if layer.window is None else window_blocks) + 1 for layer in self.layers]
        self.spare = {"full": BLOCK_TOKENS * full_blocks, "window": BLOCK_TOKENS * window_blocks}
        shapes = [(n, layer.kv_heads, layer.head_dim) for n, layer in zip(slots, self.layers, strict=True)]
        # Zeros, since a masked slot counts 0 times its value, and garbage may be NaN. Untouched, they cost nothing.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        states = 1 + config.total_layers - config.num_hidden_layers
        size = (self.spare["window"] + 1, config.hidden_size)
        self.hidden = [torch.zeros(size, dtype=dtype, device=device) for _ in range(states if states > 1 else 0)]
        self.token_bytes = {
            kind: sum(
                2 * layer.kv_heads * layer.head_dim * dtype.itemsize
                for layer in config.trunk_layers()
                if (layer.window is None) == (kind == "full")
            )
            for kind in ("full", "window")
        }

    def write(self, layer: LayerConfig, slots_N: Tensor, k_NKC: Tensor, v_NKC: Tensor) -> None:
        """Store one layer's new keys and values."""
        self.keys[layer.index].index_copy_(0, slots_N, k_NKC)
        self.values[layer.index].index_copy_(0, slots_N, v_NKC)

    def reserve(self, request: Request, end: int) -> bool:
        """Hold blocks for all positions below `end`; return False, holding no more than before, if too few are left."""
        missing = -(-end // BLOCK_TOKENS) - len(request.full)
        if missing > min(self.full.available, self.window.available):
            return False
        for _ in range(missing):
            request.full.append(self.full.take())
            request.window.append(self.window.take())
        return True

    def adopt_prefix(self, request: Request) -> None:
        """Take over the longest known prefix of the request's tokens, all but the last of which may be known."""
        count = 0 if request.params.prompt_logprobs is not None else self._known_prefix(request)
        keys = [request.key(block) for block in range(count)]
        first = self._first_visible(count * BLOCK_TOKENS)
        request.full = array("i", [self.full.share(key) for key in keys])
        request.window = array("i", [self.window.share(key) if n >= first else NOWHERE for n, key in enumerate(keys)])
        request.start_at(count * BLOCK_TOKENS)

    def settle(self, request: Request) -> None:
        """Publish the blocks that are complete, and give back those that lie behind the window."""
        complete = request.settled // BLOCK_TOKENS
        for block in range(request.published, complete):
            self.full.publish(request.full[block], request.key(block))
            if request.window[block] != NOWHERE:
                self.window.publish(request.window[block], request.key(block))
        request.published = max(request.published, complete)
        for block in range(request.freed, self._first_visible(request.settled)):
            if request.window[block] != NOWHERE:
                self.window.release(request.window[block])
                request.window[block] = NOWHERE
            request.freed = block + 1

    def release(self, request: Request) -> None:
        """Give back all blocks of a request that has ended or must wait; the last are forgotten first."""
        for pool, table in ((self.full, request.full), (self.window, request.window)):
            for block in reversed(table):
                if block != NOWHERE:
                    pool.release(block)
        request.forget_blocks()

    def bytes_held(self, request: Request) -> int:
        """Return the bytes of trunk keys and values in the blocks that a request holds."""
        window = sum(block != NOWHERE for block in request.window)
        held = len(request.full) * self.token_bytes["full"] + window * self.token_bytes["window"]
        return BLOCK_TOKENS * held

    def _first_visible(self, position: int) -> int:
        """Return the first block that a query at `position`, or any later one, still reads in a sliding layer.

        A module's input at `position` is the state of the position before, so that one is kept in any case.
        """
        return max(0, position - max(self.window_tokens - 1, 1)) // BLOCK_TOKENS

    def _known_prefix(self, request: Request) -> int:
        """Return how many leading blocks are known, those within the window in both pools."""
        most = 0
        while most < (request.length - 1) // BLOCK_TOKENS and self.full.knows(request.key(most)):
            most += 1
        while most:
            reach = range(self._first_visible(most * BLOCK_TOKENS), most)
            gap = next((n for n in reversed(reach) if not self.window.knows(request.key(n))), None)
            if gap is None:
                return most
            most = gap
        return 0
