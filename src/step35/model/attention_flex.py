"""Attention on a GPU where a window or a border hides keys: torch's FlexAttention, compiled to one fused kernel.

Which keys a query sees is told as in `compiled/attention.cpp`, by the first and the last row. Blocks of scores that are
hidden whole are never computed, and in those that are seen whole nothing is masked: O(T * window) in sliding layers.
Tests hold it to `attention_kernels.attend`, on a CPU without gradients, which torch lacks there.
"""

# B batch  T queries  S keys  H query heads  K kv heads  C head dim  N blocks of queries  M blocks of keys

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Queries, and keys, that a block of scores has; what FlexAttention's kernels are made for."""
LEAST_HEAD = 16
"""Channels of a head that these kernels need."""
KINDS = 64
"""Kernels to compile, at most: one for each dtype, number of heads, with and without gradients, ...; torch would stop
at 8 and go on unfused."""


def attend_flex(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, mask: BlockMask) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v (B, T, H, C) over what `mask` shows; C at least `LEAST_HEAD`."""
    heads_first = (x.transpose(1, 2) for x in (q_BTHC, k_BSKC, v_BSKC))
    # The kernel for decoding, which torch prefers for short rows, has no form for many heads on one.
    options = {"FORCE_USE_FLEX_ATTENTION": True} if q_BTHC.is_cuda else None
    y: Tensor = _kernel()(*heads_first, block_mask=mask, enable_gqa=True, kernel_options=options)
    return y.transpose(1, 2)


def block_mask(first_BT: Tensor, last_BT: Tensor, keys: int) -> BlockMask:
    """Return the mask that shows each query the rows `first_BT` to `last_BT` of `keys`; neither falls within a row."""
    queries = first_BT.shape[1]
    starts, ends = _ends_of_blocks(queries, first_BT.device)
    from_, to = _ends_of_blocks(keys, first_BT.device)
    # Queries down, keys across. What a block's first and last query see bounds what all of it see.
    seen_BNM = (to >= first_BT[:, starts, None]) & (from_ <= last_BT[:, ends, None])
    whole_BNM = (from_ >= first_BT[:, ends, None]) & (to <= last_BT[:, starts, None])

    def shows(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_BT[b, query]) & (key <= last_BT[b, query])

    return BlockMask.from_kv_blocks(
        *_listed(seen_BNM & ~whole_BNM),
        *_listed(whole_BNM),
        BLOCK_SIZE=BLOCK,
        mask_mod=shows,
        seq_lengths=(queries, keys),
    )


def _ends_of_blocks(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first and the last row of each block."""
    starts = torch.arange(0, size, BLOCK, device=device)
    return starts, (starts + BLOCK - 1).clamp(max=size - 1)


def _listed(blocks_BNM: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each block of queries the number of its blocks of keys, and those (in front), for all heads."""
    blocks = blocks_BNM[:, None]
    order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).contiguous(), order.int().contiguous()


@cache
def _kernel() -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(KINDS, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention)
