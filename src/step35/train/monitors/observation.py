"""What is measured in one micro-batch; the observations of a step's micro-batches add up to the step's."""

# B rows  T tokens  N tokens of all rows  H query heads  K kv heads  C head dim  E experts

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from step35.config.model import LayerConfig
from step35.model.context import Context, RoutedRows, Routing
from step35.train.monitors.attention import AttentionSums, attention_metrics, attention_sums
from step35.train.monitors.clipping import EVERY, clipped_share
from step35.train.monitors.experts import CLIPPED, LOOKED, confidence_sums, expert_metrics, expert_panels, expert_sums


class Observation:
    """Sums by layer, which the layers add to in a forward pass (`Observer`); they leave the device in `metrics`."""

    def __init__(self, experts: int, real_N: Tensor | None = None) -> None:
        """Start from nothing; `real_N` says which tokens are no padding (None: all of them)."""
        self._expert_count = experts
        self._real_N = real_N
        self.expert_sums: dict[int, Tensor] = {}
        self.clips: dict[int, float] = {}
        """Limit on the routed experts' activations of each MoE layer."""
        self.confidence_sums: dict[int, Tensor] = {}
        self.dense_sums: dict[int, Tensor] = {}
        self.attention_sums: dict[int, AttentionSums] = {}

    @torch.no_grad()
    def attention(self, layer: LayerConfig, context: Context, q_BTHC: Tensor, k_BTKC: Tensor, gate_BTH: Tensor) -> None:
        """See one layer's queries, keys and gates."""
        self.attention_sums[layer.index] = attention_sums(layer, context, q_BTHC, k_BTKC, gate_BTH)

    @torch.no_grad()
    def experts(self, layer: int, clip: float, rows: RoutedRows) -> None:
        """See one layer's routed rows."""
        self.clips[layer] = clip
        self.expert_sums[layer] = expert_sums(rows, clip, self._real_N, self._expert_count)

    @torch.no_grad()
    def dense(self, layer: int, clip: float, hidden: Tensor) -> None:
        """See what a dense MLP or shared expert will clip; padding counts."""
        share = clipped_share(hidden.flatten(0, -2)[::EVERY], clip)
        self.dense_sums[layer] = torch.stack([share.sum(), share.new_tensor(share.numel())])

    @torch.no_grad()
    def routed(self, routing: Sequence[Routing]) -> None:
        """See the routers' records, without padding."""
        self.confidence_sums = {record.layer: confidence_sums(record) for record in routing}

    def add(self, other: Observation) -> None:
        """Take in another micro-batch."""
        self.clips |= other.clips
        for ours, theirs in (
            (self.expert_sums, other.expert_sums),
            (self.confidence_sums, other.confidence_sums),
            (self.dense_sums, other.dense_sums),
        ):
            for layer, sums in theirs.items():
                ours[layer] = ours[layer] + sums if layer in ours else sums
        for layer, found in other.attention_sums.items():
            before = self.attention_sums.get(layer)
            self.attention_sums[layer] = found if before is None else before.plus(found)

    def metrics(self, groups: int) -> tuple[dict[str, float], dict[str, str]]:
        """Return the figures, and where the worst of some are."""
        figures, places = attention_metrics(self.attention_sums)
        if self.expert_sums:
            found, where = expert_metrics(self.expert_sums, groups)
            total, tokens = torch.stack(list(self.confidence_sums.values())).sum(0).tolist()
            figures |= found | {"routing_confidence": total / max(1.0, tokens)} | self._clip_shares()
            places |= where
        dense = {f"clip_share_shared.layer_{i}": float(total / count) for i, (total, count) in self.dense_sums.items()}
        return figures | dense, places

    def panels(self, groups: int) -> dict[str, object]:
        """Return the layer x expert panels."""
        return expert_panels(self.expert_sums, groups) if self.expert_sums else {}

    def _clip_shares(self) -> dict[str, float]:
        shares = {
            f"clip_share.layer_{layer}": float(sums_E5[:, CLIPPED].sum() / sums_E5[:, LOOKED].sum().clamp(min=1))
            for layer, sums_E5 in self.expert_sums.items()
            if self.clips[layer] > 0
        }
        return {"clip_share": sum(shares.values()) / max(1, len(shares)), **shares}
