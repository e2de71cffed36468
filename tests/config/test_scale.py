"""The scale dial: flash at 45 layers, sizes that hardware likes elsewhere, and the training laws by hand."""

from __future__ import annotations

import pytest

from step35.config.cost import active_parameters, trunk_parameters
from step35.config.model import ModelConfig
from step35.config.presets import flash, is_preset, preset
from step35.config.scale import LEAST, MOST, scale, scale_layers, suggest_training
from step35.errors import ConfigError

STAGE = {
    "num_nextn_predict_layers", "layer_types", "rope_theta", "partial_rotary_factors", "rope_scaling",
    "swiglu_limits", "swiglu_limits_shared", "max_position_embeddings", "eos_token_id",
}  # fmt: skip
"""Where pre-training differs from the release: one MTP module, theta and length of the first stage."""


def test_45_layers_are_flash() -> None:
    assert scale(45).model_dump(exclude=STAGE) == flash().model_dump(exclude=STAGE)
    assert trunk_parameters(scale(45)) == trunk_parameters(flash())
    assert scale(45).swiglu_limits == flash().swiglu_limits[:46]


def test_every_size_is_valid_and_splits_evenly() -> None:
    for layers in range(LEAST, MOST + 1):
        config = scale(layers)
        assert config.num_hidden_layers == layers
        assert config.hidden_size % 128 == config.intermediate_size % 128 == config.vocab_size % 128 == 0
        assert config.moe_intermediate_size % 64 == config.moe_num_experts % 32 == 0
        assert config.num_attention_groups in (1, 2, 4, 8)
        assert config.layer(1).heads * 2 == config.layer(0).heads * 3


def test_more_layers_are_more_parameters() -> None:
    sizes = [(trunk_parameters(c), active_parameters(c)) for c in map(scale, range(LEAST, MOST + 1, 4))]
    assert sizes == sorted(sizes)
    assert 2e7 < sizes[0][0] < 5e7


@pytest.mark.parametrize(("name", "layers"), [("scale-12", 12), ("scale-045", 45), ("scale", None), ("scale-x", None)])
def test_names(name: str, layers: int | None) -> None:
    assert scale_layers(name) == layers
    assert is_preset(name) == (layers is not None)
    if layers:
        assert isinstance(preset(name), ModelConfig)
        assert preset(name) == scale(layers)


@pytest.mark.parametrize("layers", [0, LEAST - 1, MOST + 1])
def test_the_dial_has_ends(layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"scale-{layers}: the dial takes {LEAST} to {MOST} trunk layers"):
        preset(f"scale-{layers}")


def test_training_by_hand() -> None:
    found = suggest_training(scale(12))
    assert found.tokens == 20 * active_parameters(scale(12))
    assert found.flops == pytest.approx(6 * active_parameters(scale(12)) * found.tokens, rel=0.4)  # and scores
    assert found.batch_tokens == pytest.approx(0.292 * found.flops**0.3271, rel=0.01)
    assert found.batch_tokens % 4096 == 0
    assert found.steps * found.batch_tokens == pytest.approx(found.tokens, rel=0.001)
    assert found.lr == pytest.approx(0.3118 / found.flops**0.125)
    assert not found.extrapolates
    assert suggest_training(scale(4)).extrapolates
    assert suggest_training(scale(45)).extrapolates
