from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from step35.config.model import FULL, SLIDING, ModelConfig
from step35.config.presets import PRESETS, flash, preset
from step35.errors import ConfigError


@pytest.fixture
def released(golden: Path) -> dict[str, Any]:
    """A released config.json of 9 layers and 3 MTP modules."""
    return dict(json.loads((golden / "tiny-a" / "config.json").read_text()))


@pytest.mark.parametrize("name", ["tiny-a", "tiny-b"])
def test_a_released_config_survives_the_round_trip(name: str, golden: Path) -> None:
    before = json.loads((golden / name / "config.json").read_text())
    config = ModelConfig.from_released(before)
    after = config.to_released()
    assert {key: after.get(key) for key in before} == before
    assert ModelConfig.from_released(json.loads(json.dumps(after))).to_released() == after


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_round_trip(name: str) -> None:
    config = preset(name)
    again = ModelConfig.from_released(json.loads(json.dumps(config.to_released())))
    assert again.model_copy(update={"other_keys": {}}) == config
    assert config.to_released()["architectures"] == ["Step3p5ForCausalLM"]
    assert config.to_released()["model_type"] == "step3p5"


def test_flash_has_the_released_numbers() -> None:
    config = flash()
    assert (config.num_hidden_layers, config.num_nextn_predict_layers, config.total_layers) == (45, 3, 48)
    assert [i for i in range(48) if config.layer_types[i] == FULL] == list(range(0, 45, 4))
    full, sliding, draft = config.layer(44), config.layer(43), config.layer(45)
    assert (full.heads, full.kv_heads, full.head_dim, full.rotary_dim, full.rope_theta) == (64, 8, 128, 64, 5e6)
    assert (sliding.heads, sliding.kv_heads, sliding.rotary_dim, sliding.rope_theta) == (96, 8, 128, 1e4)
    assert (full.window, sliding.window, draft.window) == (None, 512, 512)
    assert full.rope_scaling is not None
    assert sliding.rope_scaling is None
    assert config.moe_layers_enum == tuple(range(3, 45))
    assert not draft.moe
    clips = [(i, config.layer(i).clip, config.layer(i).clip_shared) for i in range(48)]
    assert [c for c in clips if c[1] or c[2]] == [(43, 7.0, 0.0), (44, 7.0, 16.0)]


def test_absent_keys_mean_what_the_released_code_means(released: dict[str, Any]) -> None:
    for key in ("moe_layers_enum", "yarn_only_types", "partial_rotary_factors", "rms_norm_eps", "swiglu_limits"):
        del released[key]
    released["rope_theta"] = 5e5
    released["swiglu_limits_shared"] = [None] * 12
    config = ModelConfig.from_released(released)
    assert config.moe_layers_enum == tuple(range(1, 9))
    assert all(config.layer(i).rope_scaling is not None for i in range(12))
    assert all(config.layer(i).rotary_dim == 32 for i in range(12))
    assert {config.layer(i).rope_theta for i in range(12)} == {5e5}
    assert config.rms_norm_eps == 1e-5
    assert {(config.layer(i).clip, config.layer(i).clip_shared) for i in range(12)} == {(0.0, 0.0)}


def test_without_layer_types_even_layers_are_sliding(released: dict[str, Any]) -> None:
    del released["layer_types"]
    assert ModelConfig.from_released(released).layer_types == (SLIDING, FULL) * 6


def test_moe_layers_may_be_a_list(released: dict[str, Any]) -> None:
    released["moe_layers_enum"] = [3, 5]
    config = ModelConfig.from_released(released)
    assert [i for i in range(12) if config.layer(i).moe] == [3, 5]
    assert config.to_released()["moe_layers_enum"] == "3,5"


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "head_dim"])
def test_a_missing_key_is_named(released: dict[str, Any], key: str) -> None:
    del released[key]
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        ModelConfig.from_released(released)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_router_activation", "softmax"),
        ("norm_expert_weight", False),
        ("tie_word_embeddings", True),
        ("att_impl_type", "MLA"),
        ("attention_bias", True),
        ("need_fp32_gate", False),
        ("use_head_wise_attn_gate", False),
        ("model_type", "llama"),
        ("sink", True),
    ],
)
def test_another_architecture_is_refused(released: dict[str, Any], key: str, value: object) -> None:
    released[key] = value
    with pytest.raises(ConfigError, match=rf"{key}={value!r} is not supported"):
        ModelConfig.from_released(released)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_groups": 3}, ["num_attention_heads=4", "num_attention_groups=3", "[1, 2, 4]"]),
        ({"layer_types": [FULL] * 9}, ["layer_types has 9 entries", "need 12"]),
        ({"partial_rotary_factors": [0.1] * 12}, ["partial_rotary_factors[0]=0.1", "head_dim=32", "even"]),
        ({"partial_rotary_factors": [2.0] * 12}, ["partial_rotary_factors[0]=2.0", "64 rotary channels"]),
        ({"moe_layers_enum": "3,9"}, ["[9]", "0 to 8"]),
        ({"moe_top_k": 9}, ["moe_top_k=9", "moe_num_experts=8"]),
        ({"share_expert_dim": 0}, ["share_expert_dim=0", "at least 1"]),
        ({"layer_types": ["dense"] * 12}, ["layer_types", "'dense'", "full_attention"]),
        ({"hidden_size": "wide"}, ["hidden_size='wide'", "integer"]),
    ],
)
def test_contradictions_are_named_with_key_value_and_remedy(
    released: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_released(released | changes)
    for word in words:
        assert word in str(caught.value)


def test_sliding_head_counts_are_checked_under_their_own_key(released: dict[str, Any]) -> None:
    released["attention_other_setting"]["num_attention_heads"] = 5
    with pytest.raises(ConfigError, match=r"attention_other_setting\.num_attention_heads=5 is not divisible"):
        ModelConfig.from_released(released)


def test_new_mtp_modules_take_the_last_ones_entries(released: dict[str, Any]) -> None:
    config = ModelConfig.from_released(released)
    assert config.with_mtp(3) == config
    assert config.with_mtp(0).total_layers == 9
    grown = config.with_mtp(5)
    assert [grown.layer(i).kind for i in range(9, 14)] == ["sliding"] * 5
    assert [grown.layer(i) for i in range(12)] == [config.layer(i) for i in range(12)]
