"""Whole model configs by name. `tiny` is trained by the demo; the rest are the report's Tables 6 and 9."""

from __future__ import annotations

from collections.abc import Callable

from step35.config.base import suggest
from step35.config.model import FULL, SLIDING, ModelConfig, RopeScaling, SlidingHeads
from step35.errors import ConfigError


def s3f1(
    *,
    layers: int,
    dense: int,
    mtp: int,
    heads: int,
    sliding_heads: int,
    groups: int,
    head_dim: int,
    theta_full: float = 10_000.0,
    partial: float = 0.5,
    clips: dict[int, float] | None = None,
    clips_shared: dict[int, float] | None = None,
    **rest: object,
) -> ModelConfig:
    """Build the S3F1 layout: layers 0, 4, 8, ... full, the rest and the MTP layers sliding (section 2)."""
    total = layers + mtp
    full = [i % 4 == 0 and i < layers for i in range(total)]
    return ModelConfig.parse(
        {
            "num_hidden_layers": layers,
            "num_nextn_predict_layers": mtp,
            "num_attention_heads": heads,
            "num_attention_groups": groups,
            "head_dim": head_dim,
            "attention_other_setting": SlidingHeads(
                num_attention_heads=sliding_heads,
                num_attention_groups=groups,
                head_dim=head_dim,
                true_head_dim=head_dim,
            ),
            "layer_types": [FULL if f else SLIDING for f in full],
            "rope_theta": [theta_full if f else 10_000.0 for f in full],
            "partial_rotary_factors": [partial if f else 1.0 for f in full],
            "moe_layers_enum": range(dense, layers),
            "swiglu_limits": [(clips or {}).get(i, 0.0) for i in range(total)],
            "swiglu_limits_shared": [(clips_shared or {}).get(i, 0.0) for i in range(total)],
            **rest,
        }
    )


def tiny(vocab_size: int = 4096) -> ModelConfig:
    """The demo's model: every part of the architecture in 3.1M parameters (4.5M with three MTP modules)."""
    return s3f1(
        layers=5, dense=1, mtp=1, heads=4, sliding_heads=6, groups=2, head_dim=32,
        clips={3: 7.0, 4: 7.0}, clips_shared={4: 16.0},
        vocab_size=vocab_size, hidden_size=128, intermediate_size=256, sliding_window=64,
        moe_num_experts=16, moe_top_k=4, moe_intermediate_size=32, share_expert_dim=64,
        moe_router_scaling_factor=2.0, max_position_embeddings=4096, eos_token_id=(1, 3),
    )  # fmt: skip


def mini(vocab_size: int = 16384) -> ModelConfig:
    """About 100M parameters: large enough for matrix products to dominate, small enough for one machine."""
    return s3f1(
        layers=9, dense=1, mtp=1, heads=8, sliding_heads=12, groups=4, head_dim=64,
        clips={7: 7.0, 8: 7.0}, clips_shared={8: 16.0},
        vocab_size=vocab_size, hidden_size=512, intermediate_size=1408, sliding_window=512,
        moe_num_experts=32, moe_top_k=4, moe_intermediate_size=160, share_expert_dim=160,
        moe_router_scaling_factor=3.0, max_position_embeddings=32768, eos_token_id=(1, 3),
    )  # fmt: skip


def flash() -> ModelConfig:
    """Step 3.5 Flash as released: 196B parameters, 11B active (Table 6)."""
    return s3f1(
        layers=45, dense=3, mtp=3, heads=64, sliding_heads=96, groups=8, head_dim=128, theta_full=5e6,
        clips={43: 7.0, 44: 7.0}, clips_shared={44: 16.0},
        vocab_size=128_896, hidden_size=4096, intermediate_size=11_264, sliding_window=512,
        moe_num_experts=288, moe_top_k=8, moe_intermediate_size=1280, share_expert_dim=1280,
        moe_router_scaling_factor=3.0, max_position_embeddings=262_144, eos_token_id=(1, 2, 128_007),
        rope_scaling=RopeScaling(),
    )  # fmt: skip


PRESETS: dict[str, Callable[[], ModelConfig]] = {"tiny": tiny, "mini": mini, "flash": flash}


def preset(name: str) -> ModelConfig:
    """Return the preset called `name`; raise `ConfigError` with the nearest name if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'.{suggest(name, PRESETS)} Presets: {', '.join(PRESETS)}.")
    return PRESETS[name]()
