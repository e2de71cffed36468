"""What all layers of one forward pass share: positions, document borders, rotary tables, masks, caches, records."""

# B batch  T tokens  S cached keys  H query heads  K kv heads  C head dim  E experts  N tokens of all rows
# R routed rows  I expert hidden  D model

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from step35.config.model import LayerConfig
from step35.model import attention_kernels as kernels
from step35.model.attention_flex import LEAST_HEAD, attend_flex, block_mask
from step35.model.compiled.attention import attend_spans
from step35.model.compiled.library import fits
from step35.model.rope import rope_table


@dataclass
class Routing:
    """What one MoE layer decided, kept for balance losses and monitors."""

    layer: int
    probabilities_NE: Tensor
    """Sigmoid scores, fp32, with gradient."""
    experts_NK: Tensor
    """Chosen experts."""


class Observer(Protocol):
    """Is shown what layers compute, to keep statistics of it (`train/monitors/`); it changes nothing."""

    def attention(self, layer: LayerConfig, context: Context, q_BTHC: Tensor, k_BTKC: Tensor, gate_BTH: Tensor) -> None:
        """See one layer's normed and rotated queries and keys, and its gates after the sigmoid."""
        ...

    def experts(self, layer: int, clip: float, rows: RoutedRows) -> None:
        """See one MoE layer's routed rows."""
        ...

    def dense(self, layer: int, clip: float, hidden: Tensor) -> None:
        """See gate and up, packed in the last dimension, of a dense MLP or shared expert before clipping."""
        ...


class RoutedRows(NamedTuple):
    """The rows of one MoE layer, sorted by expert: one for each token and each of its experts."""

    expert_R: Tensor
    token_R: Tensor
    hidden_R2I: Tensor
    """Gate and up before SiLU and clipping."""
    active_RI: Tensor
    """The intermediate activation: what the down projection reads."""
    out_RD: Tensor
    """The expert's output before the router's weight."""


@dataclass
class Context:
    """One forward pass over whole sequences; `segments_BT` separates packed documents (padding is -1).

    The engine's passes, whose earlier keys and values lie in a cache, override `attend`.
    """

    positions_BT: Tensor
    segments_BT: Tensor | None = None
    routing: list[Routing] | None = None
    """When a list, every MoE layer appends its record."""
    observer: Observer | None = None
    """Is shown what the layers compute; its views of MoE layers need `routing`."""
    _memo: dict[object, object] = field(default_factory=dict)

    @classmethod
    def packed(
        cls,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        *,
        record: bool = False,
        observer: Observer | None = None,
    ) -> Context:
        """Return the context of a whole sequence per row, positions counted from the start of the row."""
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand(tokens_BT.shape)
        if segments_BT is None:
            segments_BT = torch.zeros_like(tokens_BT)
        return cls(positions, kernels.documents(segments_BT), routing=[] if record else None, observer=observer)

    def rope(self, layer: LayerConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the layer's rotary cos and sin, computed once per kind of layer."""
        key = ("rope", layer.rope_theta, layer.rotary_dim, layer.rope_scaling, dtype)
        if key not in self._memo:
            self._memo[key] = rope_table(layer, self.positions_BT, dtype)
        return self._memo[key]

    def attend(self, layer: LayerConfig, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
        """Attend under this pass's visibility rules; returns (B, T, H, C)."""
        if fits(q_BTHC):
            return attend_spans(q_BTHC, k_BTKC, v_BTKC, *self._spans(layer.window))
        path = self._path(layer.window)
        if path == "documents":
            return kernels.attend_documents(q_BTHC, k_BTKC, v_BTKC, self._lengths())
        if path == "flex" and layer.head_dim >= LEAST_HEAD:
            return attend_flex(q_BTHC, k_BTKC, v_BTKC, self._block_mask(layer.window))
        mask = self._mask(path, layer.window)
        if path == "banded":
            return kernels.attend_banded(q_BTHC, k_BTKC, v_BTKC, mask, layer.window)
        return kernels.attend(q_BTHC, k_BTKC, v_BTKC, mask)

    def seen_from(self, rows_S: Tensor, window: int | None) -> Tensor:
        """Return (B, S, T), 0 where the query at a row of `rows_S` sees the key, else -inf; the same rows every time.

        For passes without a cache.
        """
        key = ("seen from", window)
        if key not in self._memo:
            seen = kernels.visible(self.positions_BT[:, rows_S], self.positions_BT, window)
            seen = seen & kernels.same_document(self.segments_BT[:, rows_S], self.segments_BT)
            self._memo[key] = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
        return self._memo[key]

    def observe_dense(self, layer: int, clip: float) -> Callable[[Tensor], None] | None:
        """Return what a dense MLP is to show its gate and up to; None when nobody looks, or nothing is clipped."""
        return partial(self.observer.dense, layer, clip) if self.observer is not None and clip > 0 else None

    def _path(self, window: int | None) -> str:
        """Return how to attend: in bands where a window hides keys, else by documents unless they are short.

        A GPU takes FlexAttention instead, unless all documents fit one causal call, which libraries do best.
        """
        lengths, tokens = self._lengths(), self.positions_BT.shape[1]
        if self.positions_BT.is_cuda:
            one_call = len(set(lengths)) <= 1 and (window is None or max(lengths, default=0) <= window)
            return "documents" if one_call else "flex"
        if window is not None and max(lengths, default=0) > window:
            return "banded" if tokens > kernels.band_width(window) else "packed"
        return "documents" if self.positions_BT.numel() >= max(1, kernels.SHORT_DOCUMENT * len(lengths)) else "packed"

    def _spans(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the first and the last row that each query sees (B, T), int32."""
        key = ("spans", window)
        if key not in self._memo:
            self._memo[key] = kernels.spans(self.segments_BT, window)
        return self._memo[key]

    def _block_mask(self, window: int | None) -> BlockMask:
        key = ("blocks", window)
        if key not in self._memo:
            self._memo[key] = block_mask(*self._spans(window), self.positions_BT.shape[1])
        return self._memo[key]

    def _lengths(self) -> list[int]:
        if "lengths" not in self._memo:
            self._memo["lengths"] = kernels.document_lengths(self.segments_BT)
        return self._memo["lengths"]

    def _mask(self, form: str, window: int | None) -> Tensor:
        key = (form, window)
        if key not in self._memo:
            self._memo[key] = self._build_mask(form, window)
        return self._memo[key]

    def _build_mask(self, form: str, window: int | None) -> Tensor:
        if form == "banded":
            return kernels.band_mask(self.positions_BT, self.segments_BT, window)
        seen = kernels.visible(self.positions_BT, self.positions_BT, window)
        return seen & kernels.same_document(self.segments_BT, self.segments_BT)
