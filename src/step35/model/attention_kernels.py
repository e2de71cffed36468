"""Softmax attention over explicit visibility rules: a plain reference, and a banded path for sliding windows.

A query at position p of document d sees keys at positions p-window+1..p of the same document (window None: all
earlier ones). The banded path costs O(T * window) instead of O(T^2); a test holds it to the reference.
"""

# B batch  T queries  S keys  H query heads  K kv heads  C head dim  N blocks  W window

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return (..., T, S): may the query at position `query` (..., T) see the key at position `key` (..., S)?"""
    distance = query[..., :, None] - key[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def same_document(query: Tensor, key: Tensor) -> Tensor:
    """Return (..., T, S): do query and key belong to the same document?"""
    return query[..., :, None] == key[..., None, :]


def attend(q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, mask_BTS: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v (B, T, H, C); query head h uses kv head h // (H/K)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BSKC, v_BSKC))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BTS[:, None], enable_gqa=True)
    return y.transpose(1, 2)


def band_mask(positions_BT: Tensor, segments_BT: Tensor, window: int) -> Tensor:
    """Return (B*N, W, 2W): visibility of each block's own and previous block's keys; padding sees itself only."""
    positions, segments = _blocks(positions_BT, window, -1), _blocks(segments_BT, window, -2)
    before_positions, before_segments = _with_previous(positions, -1), _with_previous(segments, -3)
    mask = visible(positions, before_positions, window) & same_document(segments, before_segments)
    return mask.flatten(0, 1)


def attend_banded(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, mask: Tensor, window: int) -> Tensor:
    """Return what `attend` returns for a window, from blocks of `window` queries against 2 * `window` keys."""
    tokens = q_BTHC.shape[1]
    q = _blocks(q_BTHC, window, 0.0).flatten(0, 1)
    k, v = (_with_previous(_blocks(x, window, 0.0), 0.0).flatten(0, 1) for x in (k_BTKC, v_BTKC))
    return attend(q, k, v, mask).reshape(q_BTHC.shape[0], -1, *q_BTHC.shape[2:])[:, :tokens]


def _blocks(x: Tensor, window: int, fill: float) -> Tensor:
    """Cut (B, T, ...) into (B, N, W, ...), padding the last block with `fill`."""
    short = -x.shape[1] % window
    if short:
        x = torch.cat([x, x.new_full((x.shape[0], short, *x.shape[2:]), fill)], dim=1)
    return x.unflatten(1, (-1, window))


def _with_previous(x_BNW: Tensor, fill: float) -> Tensor:
    """Put each block's predecessor before it: (B, N, W, ...) -> (B, N, 2W, ...)."""
    first = torch.full_like(x_BNW[:, :1], fill)
    return torch.cat([torch.cat([first, x_BNW[:, :-1]], dim=1), x_BNW], dim=2)
