"""Softmax attention over explicit visibility rules: a plain reference, and two paths that leave hidden keys out.

On a CPU with a compiler, `compiled/attention.py` takes the place of both; on a GPU, `attention_flex.py` takes that of
the bands.

A query at position p of document d sees keys at positions p-window+1..p of the same document (window None: all
earlier ones). `attend` computes every score and masks; tests hold the other two to it. `attend_documents` runs each
document as causal attention, half the scores; `attend_banded` costs O(T * window) instead of O(T^2).
"""

# B batch  T queries  S keys  H query heads  K kv heads  C head dim  N blocks  Q queries a block  W window

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_BLOCK = 64
"""Queries that share a band of keys; fewer make the products too small."""
SHORT_DOCUMENT = 64
"""Where documents are shorter on average, one call for all of them with masked scores is faster than one for each."""


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


def documents(segments_BT: Tensor) -> Tensor:
    """Number the runs of equal segments in each row (B, T): a document is a run, also when its number came before."""
    return _starts(segments_BT).cumsum(1)


def document_lengths(segments_BT: Tensor) -> list[int]:
    """Return the lengths of the documents of all rows, one row after the other; padding counts as a document."""
    starts = _starts(segments_BT).flatten().nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([segments_BT.numel()])).tolist()


def _starts(segments_BT: Tensor) -> Tensor:
    """Say where a document starts (B, T): at each row's beginning and wherever the number changes."""
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return starts_BT


def attend_documents(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, lengths: list[int]) -> Tensor:
    """Return what `attend` returns without a window, document by document; `lengths` as `document_lengths` gives."""
    if len(set(lengths)) == 1:  # all at once
        parts = [[x.reshape(-1, lengths[0], *x.shape[2:])] for x in (q_BTHC, k_BTKC, v_BTKC)]
    else:
        parts = [[y[None] for y in x.flatten(0, 1).split(lengths)] for x in (q_BTHC, k_BTKC, v_BTKC)]
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        outputs.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).view(q_BTHC.shape)


def spans(segments_BT: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Return the first and the last row that the query at each row sees (B, T), int32: of its document and window."""
    last_BT = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand(segments_BT.shape)
    first_BT = torch.where(_starts(segments_BT), last_BT, 0).cummax(1).values
    first_BT = first_BT if window is None else first_BT.maximum(last_BT - window + 1)
    return first_BT.int().contiguous(), last_BT.int().contiguous()


def band_mask(positions_BT: Tensor, segments_BT: Tensor, window: int) -> Tensor:
    """Return (B*N, Q, W + Q): visibility of the keys of each block's band; padding sees padding only."""
    positions, segments = _blocks(positions_BT, window, -1), _blocks(segments_BT, window, -2)
    key_positions = _bands(positions_BT, window, -1, -1)
    key_segments = _bands(segments_BT, window, -3, -2)
    return (visible(positions, key_positions, window) & same_document(segments, key_segments)).flatten(0, 1)


def attend_banded(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, mask: Tensor, window: int) -> Tensor:
    """Return what `attend` returns for a window, from blocks of Q queries against the W + Q keys they may see."""
    batch, tokens = q_BTHC.shape[:2]
    q = _blocks(q_BTHC, window, 0.0).flatten(0, 1)
    k, v = (_bands(x, window, 0.0, 0.0).flatten(0, 1) for x in (k_BTKC, v_BTKC))
    return attend(q, k, v, mask).reshape(batch, -1, *q_BTHC.shape[2:])[:, :tokens]


def band_width(window: int) -> int:
    """Return the keys W + Q of a band."""
    return window + _block(window)


def _block(window: int) -> int:
    """Return Q: a quarter of the window, so that a fifth of the scores are masked ones."""
    return max(SMALLEST_BLOCK, window // 4)


def _blocks(x_BT: Tensor, window: int, fill: float) -> Tensor:
    """Cut (B, T, ...) into (B, N, Q, ...), padding the last block with `fill`."""
    return _padded(x_BT, 0, -x_BT.shape[1] % _block(window), fill, fill).unflatten(1, (-1, _block(window)))


def _bands(x_BT: Tensor, window: int, before: float, after: float) -> Tensor:
    """Give each block its own rows and the `window` rows before them: (B, T, ...) -> (B, N, W + Q, ...)."""
    block = _block(window)
    padded = _padded(x_BT, window, -x_BT.shape[1] % block, before, after)
    return padded.unfold(1, window + block, block).movedim(-1, 2)


def _padded(x_BT: Tensor, front: int, back: int, before: float, after: float) -> Tensor:
    shape = (x_BT.shape[0], -1, *x_BT.shape[2:])
    ends = [x_BT.new_full((), fill).expand(shape[0], n, *shape[2:]) for fill, n in ((before, front), (after, back))]
    return torch.cat([ends[0], x_BT, ends[1]], dim=1) if front or back else x_BT
