"""Expert figures against loops and numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from step35.data.packing import Batch
from step35.model.context import Context, RoutedRows, Routing
from step35.model.step35 import Step35
from step35.train.balance import without_padding
from step35.train.monitors.clipping import clipped_share, inverse_silu
from step35.train.monitors.experts import expert_metrics, expert_panels, expert_sums
from step35.train.monitors.observation import Observation

Observe = Callable[..., tuple[Step35, Observation]]


@pytest.fixture
def observe(make_model: Callable[..., Step35], make_batch: Callable[..., Batch]) -> Observe:
    """Return a function that runs rows of a batch under an observer."""

    def observe(rows: slice = slice(None)) -> tuple[Step35, Observation]:
        model, batch = make_model(), make_batch()
        tokens, segments = torch.as_tensor(batch.tokens[rows]), torch.as_tensor(batch.segments[rows])
        observation = Observation(4, segments.flatten() >= 0)
        context = Context.packed(tokens, segments, record=True, observer=observation)
        with torch.no_grad():
            model.trunk(tokens, context)
        observation.routed(without_padding(context.routing or [], segments))
        return model, observation

    return observe


def sums(counts: list[float], rms: list[float], output: list[float], clipped: float = 0.0) -> torch.Tensor:
    """Return the sums of a layer whose experts have these figures."""
    n = torch.tensor(counts)
    return torch.stack([n, n * torch.tensor(rms) ** 2, n * torch.tensor(output) ** 2, n * clipped, n], dim=1)


def test_sums_equal_a_count_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, out = torch.randn(6, 8, generator=generator), torch.randn(6, 5, generator=generator)
    gate, up = hidden.chunk(2, -1)
    active = F.silu(gate).clamp(max=0.3) * up.clamp(-0.3, 0.3)
    rows = RoutedRows(torch.tensor([0, 0, 1, 1, 1, 3]), torch.tensor([0, 2, 0, 2, 1, 1]), hidden, active, out)
    real = torch.tensor([True, True, False])  # token 2 is padding
    found = expert_sums(rows, 0.3, real, 4)
    for expert, places in {0: [0], 1: [2, 4], 2: [], 3: [5]}.items():
        square = sum(float(active[i].square().mean()) for i in places)
        output = sum(float(out[i].norm()) ** 2 for i in places)
        looked = [i for i in places if i in (0, 4)]  # every fourth row
        changed = sum(float(((F.silu(gate[i]) > 0.3) | (up[i].abs() > 0.3)).float().mean()) for i in looked)
        assert found[expert].tolist() == pytest.approx([len(places), square, output, changed, len(looked)], rel=1e-5)


@pytest.mark.parametrize("clip", [0.01, 0.4, 7.0])
def test_the_threshold_of_the_gate_inverts_silu(clip: float) -> None:
    threshold = inverse_silu(clip)
    assert threshold / (1 + math.exp(-threshold)) == pytest.approx(clip, rel=1e-12)
    hidden = torch.linspace(-9, 9, 2002)
    gate, up = hidden.chunk(2)
    assert clipped_share(hidden, clip) == ((F.silu(gate) > clip) | (up.abs() > clip)).float().mean()


def test_load_by_hand() -> None:
    found, places = expert_metrics(
        {3: sums([3, 2, 1, 0], [1] * 4, [1] * 4), 5: sums([2, 2, 1, 1], [1] * 4, [1] * 4)}, 2
    )
    # loads 3, 2, 1, 0: mean 3/2, standard deviation sqrt(5)/2; 2, 2, 1, 1: mean 3/2, deviation 1/2
    assert found["load_cv"] == pytest.approx((5**0.5 / 3 + 1 / 3) / 2)
    assert found["load_cv_max"] == pytest.approx(5**0.5 / 3)
    assert places["load_cv_max"] == "layer 3"
    assert (found["dead_experts"], found["dead_share"]) == (1, 1 / 8)
    assert places["dead_share"] == "layer 3, expert 3"
    assert found["group_load_max"] == pytest.approx(2 * 5 / 6)


def test_ratios_leave_idle_experts_out_and_name_the_place() -> None:
    layers = {
        1: sums([4, 4, 4, 0], [1.0, 1.0, 1.2, 0.0], [2.0, 2.0, 2.0, 0.0]),
        2: sums([4, 4, 4, 4], [1.0, 0.1, 1.0, 1.5], [1.0, 1.0, 30.0, 1.0]),
    }
    found, places = expert_metrics(layers, 1)
    assert found["expert_output_max_ratio"] == pytest.approx(30.0)
    assert places["expert_output_max_ratio"] == "layer 2, expert 2"
    assert found["expert_output_min_ratio"] == pytest.approx(1.0)
    assert found["expert_rms_min_ratio"] == pytest.approx(0.1)
    assert places["expert_rms_min_ratio"] == "layer 2, expert 1"
    assert found["expert_rms_max_ratio"] == pytest.approx(1.5)


def test_panels_by_hand() -> None:
    found = expert_panels({2: sums([6, 2, 0, 0], [1.0, 0.5, 9.0, 9.0], [2.0, 3.0, 0.0, 0.0], clipped=0.25)}, 2)
    assert found["moe_layers"] == [2]
    assert found["expert_load"] == [[0.75, 0.25, 0.0, 0.0]]
    assert found["group_load"] == [[1.0, 0.0]]
    assert found["expert_rms"] == [[1.0, 0.5, 0.0, 0.0]]
    assert found["expert_output"] == [[2.0, 3.0, 0.0, 0.0]]
    assert found["expert_clip"] == [[0.25, 0.25, 0.0, 0.0]]


def test_micro_batches_add_up_to_the_batch(observe: Observe) -> None:
    _, whole = observe()
    total = Observation(4)
    for row in range(4):
        total.add(observe(slice(row, row + 1))[1])
    expected, expected_places = whole.metrics(2)
    found, places = total.metrics(2)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        sampled = key.startswith("clip_share")  # of every fourth row, which are not the same rows
        assert found[key] == pytest.approx(value, rel=0.1 if sampled else 1e-4), key
    assert places == expected_places
    assert sum(sum(layer) for layer in whole.panels(2)["expert_load"]) == pytest.approx(4)


def test_clipping_is_told_by_layer_where_there_is_a_limit(observe: Observe) -> None:
    model, observation = observe()
    found, _ = observation.metrics(2)
    shares = {key: value for key, value in found.items() if key.startswith("clip_share")}
    assert set(shares) == {
        "clip_share", "clip_share.layer_2", "clip_share.layer_4", "clip_share_shared.layer_0",
        "clip_share_shared.layer_4",
    }  # fmt: skip
    assert all(0 < share < 1 for share in shares.values())
    assert shares["clip_share"] == pytest.approx((shares["clip_share.layer_2"] + shares["clip_share.layer_4"]) / 2)
    assert model.layers[0].mlp.clip == 0.4


def test_confidence_is_the_probability_on_the_chosen() -> None:
    observation = Observation(4)
    observation.routed([Routing(3, torch.tensor([[0.6, 0.2, 0.2, 0.0]] * 3), torch.tensor([[0, 1], [0, 1], [0, 2]]))])
    total, tokens = observation.confidence_sums[3].tolist()
    assert total / tokens == pytest.approx(0.8)
