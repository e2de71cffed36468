"""Attention figures against scores computed in full."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from step35.config.model import LayerConfig
from step35.data.packing import Batch
from step35.model.context import Context
from step35.model.step35 import Step35
from step35.train.monitors.attention import attention_metrics, attention_sums, logit_bound, sampled_logit_max


class Kept:
    """Keeps what the layers show."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[LayerConfig, Context, Tensor, Tensor, Tensor]] = {}

    def attention(self, layer: LayerConfig, context: Context, *shown: Tensor) -> None:
        self.seen[layer.index] = (layer, context, *shown)  # type: ignore[assignment]

    def experts(self, *unused: object) -> None: ...

    def dense(self, *unused: object) -> None: ...


@pytest.fixture
def kept(make_model: Callable[..., Step35], make_batch: Callable[..., Batch]) -> tuple[Step35, Kept, Tensor]:
    model, batch, kept = make_model(), make_batch(), Kept()
    tokens, segments = torch.as_tensor(batch.tokens), torch.as_tensor(batch.segments)
    with torch.no_grad():
        model.trunk(tokens, Context.packed(tokens, segments, observer=kept))
    return model, kept, segments


def scores(layer: LayerConfig, q: Tensor, k: Tensor, segments: Tensor) -> Tensor:
    """Return every visible logit (B, H, T, S), the others -inf."""
    k = k.repeat_interleave(layer.heads // layer.kv_heads, dim=2)
    logits = torch.einsum("bthc,bshc->bhts", q, k) / layer.head_dim**0.5
    places = torch.arange(q.shape[1])
    distance = places[:, None] - places[None, :]
    seen = (distance >= 0) & (distance < (layer.window or 10**9))
    seen = seen & (segments[:, :, None] == segments[:, None, :])
    return logits.masked_fill(~seen[:, None], -torch.inf)


def test_sampled_logits_are_those_of_the_full_scores(kept: tuple[Step35, Kept, Tensor]) -> None:
    _, observer, segments = kept
    assert sorted(observer.seen) == [0, 1, 2, 3, 4]
    for layer, context, q, k, _ in observer.seen.values():
        full = scores(layer, q, k, segments)
        assert sampled_logit_max(layer, context, q, k) == pytest.approx(float(full[:, :, [11, 23]].max()), rel=1e-5)


def test_no_logit_exceeds_the_bound(kept: tuple[Step35, Kept, Tensor]) -> None:
    model, observer, segments = kept
    largest = max(float(scores(layer, q, k, segments).max()) for layer, _, q, k, _ in observer.seen.values())
    bound = logit_bound(dict(model.named_parameters()))
    assert 0 < largest <= bound
    with torch.no_grad():
        model.layers[2].attention.q_norm.weight.add_(9.0)
    assert logit_bound(dict(model.named_parameters())) > 3 * bound


def test_gates_and_the_place_of_the_largest_logit(kept: tuple[Step35, Kept, Tensor]) -> None:
    _, observer, _ = kept
    layer, context, q, k, gate = observer.seen[0]
    gate = torch.full_like(gate, 0.5)
    gate[..., 1] = 0.001  # a head that is shut
    gate[0, 0, 0] = 0.0
    layers = {0: attention_sums(layer, context, q, k, gate), 4: attention_sums(layer, context, 9 * q, k, gate)}
    found, places = attention_metrics(layers)
    assert places == {"attention_logit_max": "layer 4"}
    assert found["closed_heads"] == 2
    assert found["gate_closed"] == pytest.approx((1 + 1 / gate[..., 0].numel()) / 2)
    assert found["gate_mean"] == pytest.approx(float(gate.mean()), rel=1e-5)
    both = layers[0].plus(layers[4])
    assert both.tokens == 2 * layers[0].tokens
    assert both.logit == layers[4].logit
