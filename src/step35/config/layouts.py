"""Attention layouts: which layers see everything and which a window (section 2, Table 1)."""

from __future__ import annotations

from step35.config.model import FULL, SLIDING, ModelConfig, SlidingHeads


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
            "attention_other_setting": _sliding(sliding_heads, groups, head_dim),
            "layer_types": [FULL if f else SLIDING for f in full],
            "rope_theta": [theta_full if f else 10_000.0 for f in full],
            "partial_rotary_factors": [partial if f else 1.0 for f in full],
            "moe_layers_enum": range(dense, layers),
            "swiglu_limits": [(clips or {}).get(i, 0.0) for i in range(total)],
            "swiglu_limits_shared": [(clips_shared or {}).get(i, 0.0) for i in range(total)],
            **rest,
        }
    )


def with_layout(config: ModelConfig, *, period: int, sliding_heads: int) -> ModelConfig:
    """Return `config` with every `period`-th trunk layer full and the rest sliding; MTP layers stay as they are.

    A full layer takes layer 0's theta and rotary share, a sliding one 10,000 and all channels.
    """
    trunk = config.num_hidden_layers
    full = [i % period == 0 for i in range(trunk)]
    theta, partial = config.rope_theta, config.partial_rotary_factors
    return ModelConfig.parse(
        {
            **config.model_dump(),
            "layer_types": [FULL if f else SLIDING for f in full] + list(config.layer_types[trunk:]),
            "rope_theta": [theta[0] if f else 10_000.0 for f in full] + list(theta[trunk:]),
            "partial_rotary_factors": [partial[0] if f else 1.0 for f in full] + list(partial[trunk:]),
            "attention_other_setting": _sliding(sliding_heads, config.num_attention_groups, config.head_dim),
        }
    )


def _sliding(heads: int, groups: int, head_dim: int) -> SlidingHeads:
    return SlidingHeads(
        num_attention_heads=heads, num_attention_groups=groups, head_dim=head_dim, true_head_dim=head_dim
    )
