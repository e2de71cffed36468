"""Attention health: logits of sampled queries, a bound on all logits, and the head-wise gates."""

# B batch  T tokens  S sampled queries  H query heads  K kv heads  C head dim

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from step35.config.model import LayerConfig
from step35.model.context import Context
from step35.train.monitors.measure import Measure

MEASURES = (
    Measure(
        "attention_logit_max",
        "max of q.k / sqrt(C) over the visible keys of 2 sampled queries a row (the last of each half), all layers "
        "and heads: a sample, not the maximum of all queries",
        "below 50",
        "growing logits saturate the softmax: lower `lr`, check the QK-norm weights; QK-norm bounds them (next line)",
    ),
    Measure(
        "attention_logit_bound",
        "max over layers of sqrt(C) * max\\|1 + w_q\\| * max\\|1 + w_k\\|, w QK-norm weights: no logit exceeds it",
        "below 200",
        "decay the QK-norm weights (they have no weight decay here)",
    ),
    Measure("gate_mean", "mean of the head-wise gates", "0.2 to 0.8", "see gate_closed"),
    Measure(
        "gate_closed",
        "share of (token, head) gates below 0.01",
        "below 0.2",
        "closed heads compute for nothing: lower `lr`; look at closed_heads",
    ),
    Measure("closed_heads", "number of (layer, head) whose mean gate is below 0.01", "0", "as above"),
)

SAMPLED = 2
"""Queries of a row whose logits are computed: the cost is SAMPLED / T of the layer's scores."""
CLOSED = 0.01


class AttentionSums(NamedTuple):
    """One layer's figures: the largest sampled logit, and sums over tokens by head."""

    logit: Tensor
    gate_H: Tensor
    closed_H: Tensor
    tokens: int

    def plus(self, other: AttentionSums) -> AttentionSums:
        """Return the figures of both micro-batches together."""
        return AttentionSums(
            torch.maximum(self.logit, other.logit),
            self.gate_H + other.gate_H,
            self.closed_H + other.closed_H,
            self.tokens + other.tokens,
        )


def attention_sums(
    layer: LayerConfig, context: Context, q_BTHC: Tensor, k_BTKC: Tensor, gate_BTH: Tensor
) -> AttentionSums:
    """Return one layer's figures in one micro-batch."""
    gate = gate_BTH.flatten(0, 1)
    logit = sampled_logit_max(layer, context, q_BTHC, k_BTKC)
    return AttentionSums(logit, gate.sum(0, dtype=torch.float32), (gate < CLOSED).sum(0).float(), len(gate))


def sampled_logit_max(layer: LayerConfig, context: Context, q_BTHC: Tensor, k_BTKC: Tensor) -> Tensor:
    """Return the largest visible logit of the sampled queries; the scores of the others never exist."""
    tokens = q_BTHC.shape[1]
    sampled = min(SAMPLED, tokens)
    rows_S = torch.arange(1, sampled + 1, device=q_BTHC.device) * tokens // sampled - 1
    q_BKSGC = q_BTHC[:, rows_S].reshape(len(q_BTHC), sampled, layer.kv_heads, -1, layer.head_dim).transpose(1, 2)
    k_BKTC = k_BTKC.transpose(1, 2).contiguous()  # one copy; a product with the view copies far more slowly
    logits: Tensor = (q_BKSGC.flatten(2, 3) @ k_BKTC.mT).view(*q_BKSGC.shape[:-1], -1).float()
    visible_BST = context.seen_from(rows_S, layer.window)
    largest = (logits + visible_BST[:, None, :, None]).amax()
    return largest / math.sqrt(layer.head_dim)


def attention_metrics(layers: Mapping[int, AttentionSums]) -> tuple[dict[str, float], dict[str, str]]:
    """Return figures over all layers, and which layer has the largest logit."""
    logits = torch.stack([sums.logit for sums in layers.values()]).tolist()
    gate = torch.cat([sums.gate_H / sums.tokens for sums in layers.values()])
    closed = torch.cat([sums.closed_H / sums.tokens for sums in layers.values()])
    figures = {
        "attention_logit_max": max(logits),
        "gate_mean": float(gate.mean()),
        "gate_closed": float(closed.mean()),
        "closed_heads": int((gate < CLOSED).sum()),
    }
    return figures, {"attention_logit_max": f"layer {list(layers)[logits.index(max(logits))]}"}


def logit_bound(named: Mapping[str, Tensor]) -> float:
    """Return the largest logit that QK-norm allows: |normed q| <= sqrt(C) max|1 + w_q|, rotation keeps lengths."""
    bounds = []
    for name, q_weight in named.items():
        if name.endswith("q_norm.weight"):
            k_weight = named[name.replace("q_norm", "k_norm")]
            largest = [(1 + weight.detach().float()).abs().max() for weight in (q_weight, k_weight)]
            bounds.append(len(q_weight) ** 0.5 * largest[0] * largest[1])
    return float(torch.stack(bounds).max()) if bounds else 0.0
