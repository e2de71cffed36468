"""The cost formulas against built models, against the released model's known figures, and against loops."""

from __future__ import annotations

import time

import pytest
import torch

from step35.config.cost import active_parameters, cost, parts, trunk_parameters
from step35.config.presets import PRESETS, flash, preset, tiny
from step35.model.step35 import Step35

BUILDS = [(name, mtp) for name in PRESETS for mtp in (0, 1, 3) if mtp == 0 or preset(name).num_nextn_predict_layers]


@pytest.mark.parametrize(("name", "mtp"), [*BUILDS, ("scale-4", 1), ("scale-12", 1), ("scale-45", 3)])
def test_parts_add_up_to_the_built_model(name: str, mtp: int) -> None:
    config = preset(name).with_mtp(mtp)
    with torch.device("meta"):
        model = Step35(config)
    built = sum(tensor.numel() for tensor in model.state_dict().values())
    assert sum(part.total for part in parts(config)) == built


def test_flash_builds_on_the_meta_device_in_seconds() -> None:
    start = time.perf_counter()
    with torch.device("meta"):
        model = Step35(flash())
    assert time.perf_counter() - start < 15  # 1.4 s measured; the rest is for busy machines
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_flash_has_the_released_models_figures() -> None:
    config = flash()
    found = {part.name: part.total for part in parts(config)}
    assert trunk_parameters(config) == 196_956_130_368
    assert round(active_parameters(config) / 1e9, 2) == 10.93
    assert round(found["MTP, without heads"] / 1e9, 2) == 0.84
    assert round((found["MTP, without heads"] + found["MTP heads"]) / 1e9, 2) == 2.43


@pytest.mark.parametrize(("name", "trunk", "active"), [("mini", 0.1, 0.02), ("30b-a3b", 30, 3), ("100b-a10b", 100, 10)])
def test_presets_have_the_sizes_of_their_names(name: str, trunk: float, active: float) -> None:
    config = preset(name)
    assert trunk_parameters(config) / 1e9 == pytest.approx(trunk, rel=0.1)
    assert active_parameters(config) / 1e9 == pytest.approx(active, rel=0.15)


def test_table_9_models_have_the_reports_numbers() -> None:
    small, large = preset("30b-a3b"), preset("100b-a10b")
    assert (small.num_hidden_layers, small.hidden_size, small.moe_num_experts, small.moe_top_k) == (48, 2048, 128, 8)
    assert (large.num_hidden_layers, large.hidden_size, large.moe_num_experts, large.moe_top_k) == (43, 4096, 96, 4)
    assert (small.num_nextn_predict_layers, large.num_nextn_predict_layers) == (0, 1)
    assert {small.layer(0).rotary_dim, small.layer(1).rotary_dim} == {64, 128}  # partial RoPE
    assert set(large.partial_rotary_factors) == {1.0}
    assert (min(small.moe_layers_enum), min(large.moe_layers_enum)) == (1, 1)


@pytest.mark.parametrize("context", [1, 63, 64, 65, 500])
def test_cache_and_scores_by_loops(context: int) -> None:
    config = tiny()
    kept = scores = prompt = 0
    for index in range(config.num_hidden_layers):
        layer = config.layer(index)
        window = layer.window or context
        kept += min(context, window) * 2 * layer.kv_heads * layer.head_dim
        seen = [sum(0 <= query - key < window for key in range(context)) for query in range(context)]
        scores += 4 * layer.heads * layer.head_dim * seen[-1]
        prompt += 4 * layer.heads * layer.head_dim * sum(seen)
    products = 2 * (active_parameters(config) + config.vocab_size * config.hidden_size)
    found = cost(config, context, weight_bytes=2, cache_bytes=1)
    assert found.cache_bytes == kept
    assert found.decode_flops == products + scores
    assert found.prefill_flops == pytest.approx(products + prompt / context)
    assert found.read_bytes == products + kept


def test_only_full_layers_grow_past_the_window() -> None:
    config = flash()
    full = sum(layer.window is None for layer in map(config.layer, range(config.num_hidden_layers)))
    grown = cost(config, 20_000).cache_bytes - cost(config, 10_000).cache_bytes
    assert grown == full * 10_000 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("layers", ["1", "0"])
def test_tokens_use_no_more_than_there_is(layers: str) -> None:
    for part in parts(preset("mini").with_mtp(int(layers))):
        assert 0 < part.active <= part.total
