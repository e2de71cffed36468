"""Expert health figures against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from step35.data.packing import Batch
from step35.model.context import Context, Routing
from step35.model.step35 import Step35
from step35.train.monitors.experts import load_metrics, panels


def record(experts: list[list[int]], probabilities: list[list[float]], clipped: float = 0.25) -> Routing:
    made = Routing(3, torch.tensor(probabilities), torch.tensor(experts))
    made.clipped = torch.tensor(clipped)
    return made


def test_load_confidence_and_clipping_by_hand() -> None:
    uneven = record([[0, 1], [0, 1], [0, 2]], [[0.6, 0.2, 0.2, 0.0]] * 3)
    found = load_metrics([uneven])
    # loads 3, 2, 1, 0 of 6: mean 1/4, standard deviation sqrt(5)/12
    assert found["load_cv"] == pytest.approx(5**0.5 / 12 * 4)
    assert found["dead_experts"] == 1
    assert found["routing_confidence"] == pytest.approx((0.8 + 0.8 + 0.8) / 3)
    assert found["clip_share"] == pytest.approx(0.25)


def test_layers_are_averaged_and_their_idle_experts_added() -> None:
    even = record([[0, 1], [2, 3]], [[0.5] * 4] * 2, clipped=0.75)
    lopsided = record([[0, 1], [0, 1]], [[1.0, 1.0, 0.0, 0.0]] * 2)
    found = load_metrics([even, lopsided])
    assert found["load_cv"] == pytest.approx((0.0 + 1.0) / 2)
    assert found["dead_experts"] == 2
    assert found["clip_share"] == pytest.approx(0.5)
    assert found["routing_confidence"] == pytest.approx((0.5 + 1.0) / 2)


def test_panels_follow_the_layers_of_a_model(
    make_model: Callable[..., Step35], make_batch: Callable[..., Batch]
) -> None:
    model, batch = make_model(), make_batch()
    tokens, segments = torch.as_tensor(batch.tokens), torch.as_tensor(batch.segments)
    context = Context.packed(tokens, segments, record=True)
    with torch.no_grad():
        model.trunk(tokens, context)
        model.layers[2].moe.experts.down_proj[1] = 0.0
    found = panels(context.routing or [], model)
    assert [sum(load) for load in found["expert_load"]] == pytest.approx([1.0] * 4)
    norms = found["expert_norm"]
    assert (len(norms), len(norms[0])) == (4, 4)
    assert [value == 0 for value in norms[1]] == [False, True, False, False]
    expected = model.layers[4].moe.experts.down_proj[3].square().sum().sqrt().item()
    assert norms[3][3] == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for layer in found["expert_rms"] for value in layer)
