"""Whole model configs by name. `tiny` is trained by the demo; the larger ones are the report's Tables 6 and 9."""

from __future__ import annotations

from collections.abc import Callable

from step35.config.base import suggest
from step35.config.layouts import s3f1
from step35.config.model import ModelConfig, RopeScaling
from step35.config.scale import LEAST, MOST, scale, scale_layers
from step35.errors import ConfigError


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
    """About 100M parameters: large enough for matrix products to dominate, small enough for one machine.

    92.7M in the trunk, 104.8M with the MTP module, 20.8M active; all sizes are ours.
    """
    return s3f1(
        layers=9, dense=1, mtp=1, heads=8, sliding_heads=12, groups=4, head_dim=64,
        clips={7: 7.0, 8: 7.0}, clips_shared={8: 16.0},
        vocab_size=vocab_size, hidden_size=512, intermediate_size=1408, sliding_window=512,
        moe_num_experts=32, moe_top_k=4, moe_intermediate_size=160, share_expert_dim=160,
        moe_router_scaling_factor=3.0, max_position_embeddings=32768, eos_token_id=(1, 3),
    )  # fmt: skip


def a3b() -> ModelConfig:
    """The layout ablation's 30B-A3B: 30.5B parameters, 3.4B active.

    The report's (Tables 1, 8 and 9): 48 layers, width 2048, one leading dense layer, 128 experts top-8 + 1 shared,
    32 full and 48 sliding heads, 8 KV heads, partial RoPE, no MTP, 4,096 tokens. Ours, so that total and active
    come near the name: expert hidden 768, dense hidden 6144 (eight experts' width), head dim 128,
    window 512, vocabulary 129,280 (that of 100B-A10B), router scale 3.0 and no clips.
    """
    return s3f1(
        layers=48, dense=1, mtp=0, heads=32, sliding_heads=48, groups=8, head_dim=128,
        vocab_size=129_280, hidden_size=2048, intermediate_size=6144, sliding_window=512,
        moe_num_experts=128, moe_top_k=8, moe_intermediate_size=768, share_expert_dim=768,
        moe_router_scaling_factor=3.0, max_position_embeddings=4096,
    )  # fmt: skip


def a10b() -> ModelConfig:
    """The gate ablation's 100B-A10B: 101.7B parameters (102.5B with MTP), 9.4B active.

    The report's (Table 9): 43 layers, width 4096, one leading dense layer, 96 experts top-4 + 1 shared, 8 KV heads,
    vocabulary 129,280, no partial RoPE, MTP on, 4,096 tokens. Ours, so that total and active come near the name:
    expert hidden 1920, dense hidden 11,264, 64 full and 96 sliding heads of dim 128 and window 512 (flash's), one
    MTP module (the main stages train one), router scale 3.0 and no clips.
    """
    return s3f1(
        layers=43, dense=1, mtp=1, heads=64, sliding_heads=96, groups=8, head_dim=128, partial=1.0,
        vocab_size=129_280, hidden_size=4096, intermediate_size=11_264, sliding_window=512,
        moe_num_experts=96, moe_top_k=4, moe_intermediate_size=1920, share_expert_dim=1920,
        moe_router_scaling_factor=3.0, max_position_embeddings=4096,
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


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "mini": mini,
    "30b-a3b": a3b,
    "100b-a10b": a10b,
    "flash": flash,
}
PRESET_NAMES = f"{', '.join(PRESETS)}, or scale-N (N trunk layers, {LEAST} to {MOST})"


def preset(name: str) -> ModelConfig:
    """Return the preset called `name`, or for "scale-N" what the dial gives at N trunk layers.

    Raises `ConfigError` with the nearest name if there is none.
    """
    layers = scale_layers(name)
    if layers is not None:
        return scale(layers)
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'.{suggest(name, PRESETS)} Presets: {PRESET_NAMES}.")
    return PRESETS[name]()


def is_preset(name: str) -> bool:
    """Return whether `preset` knows `name`."""
    return name in PRESETS or scale_layers(name) is not None
