"""Keys and values of a batch of sequences: one slot a position, every layer alike.

Slots past a sequence's end hold rejected drafts or padding. They need no clearing: a query never sees a slot
after its own position, and a position is written before any query reaches it. Sliding layers keep all slots too;
window-bounded paging belongs to a scheduler with blocks.
"""

# B batch  T new tokens  S slots  K kv heads  C head dim

from __future__ import annotations

import torch
from torch import Tensor

from step35.config.model import ModelConfig


class DenseCache:
    """Implements `model.context.KeyValueCache` for `batch` sequences of at most `slots` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        mtp: bool,
    ) -> None:
        layers = config.layers() if mtp else config.trunk_layers()
        shapes = [(batch, slots, layer.kv_heads, layer.head_dim) for layer in layers]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.row_B1 = torch.arange(batch, device=device)[:, None]
        self.positions_BT = torch.empty(0)
        self.used = 0

    def begin(self, positions_BT: Tensor) -> Tensor:
        """Say where the next forward pass writes; returns the positions (B, S) of the keys it will see."""
        self.positions_BT = positions_BT
        self.used = int(positions_BT.max()) + 1
        return torch.arange(self.used, device=positions_BT.device).expand(len(positions_BT), -1)

    def extend(self, layer: int, k_BTKC: Tensor, v_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values and return all used slots, each (B, S, K, C)."""
        for store, new in ((self.keys[layer], k_BTKC), (self.values[layer], v_BTKC)):
            if len(new) == 1:  # one sequence: its positions are consecutive, and a slice copy is the fast way
                start = int(self.positions_BT[0, 0])
                store[0, start : start + new.shape[1]] = new[0]
            else:
                store[self.row_B1[: len(new)], self.positions_BT] = new.to(store.dtype)
        return self.keys[layer][: len(k_BTKC), : self.used], self.values[layer][: len(k_BTKC), : self.used]

    def share_first(self, length: int) -> None:
        """Copy the first `length` slots of sequence 0 to all others: a common prompt prefix is computed once."""
        for store in (*self.keys, *self.values):
            store[1:, :length] = store[:1, :length]

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but `rows`."""
        self.keys = [store[rows] for store in self.keys]
        self.values = [store[rows] for store in self.values]
        self.row_B1 = self.row_B1[: len(rows)]
