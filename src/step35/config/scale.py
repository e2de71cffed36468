"""One dial, the number of trunk layers, gives a whole model and the training settings that suit it.

The shape keeps flash's ratios (Table 6), so that 45 layers give flash's own; `LAWS` names each law and its source.
The training laws were fitted by others on other models: starting points, to be checked by a short run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from step35.config.cost import active_parameters, cost
from step35.config.layouts import s3f1
from step35.config.model import ModelConfig
from step35.errors import ConfigError

LEAST, MOST = 4, 96
"""Trunk layers the dial takes: fewer have no whole S3F1 block, more is far beyond what the laws were seen at."""
CONTEXT = 4096
"""Tokens of a row in pre-training (section 4.2)."""
TOKENS_PER_PARAMETER = 20
RANGE_FLOPS = (1e17, 2e19)
"""Where the batch and rate laws were fitted; outside they extrapolate."""

LAWS = {
    "width": ("4096/45 a layer, to 128", "flash's ratio (Table 6)"),
    "head dim": ("128, or 64 below width 1024", "flash; below it ours, for at least 8 heads"),
    "heads, full": ("2 x width / head dim, to 8 (to 16 from 64)", "flash's ratio"),
    "heads, sliding": ("1.5 x full", "flash (Table 1: +heads)"),
    "KV heads": ("full heads / 8, down to 1, 2, 4 or 8", "flash's 8, for 8-way tensor parallel (section 2)"),
    "dense FFN": ("2.75 x width, to 128", "flash's ratio"),
    "dense layers": ("1 in 15, at least 1", "flash's ratio"),
    "experts, top-8 + 1 shared": ("288/45 a layer, to 32, 32 to 288", "flash at 45; less sparse below it is ours"),
    "expert hidden": ("0.3125 x width, to 64", "flash's ratio"),
    "vocabulary": ("128,896/45 a layer, to 128", "flash at 45; grows with the model (arXiv:2407.13623), line is ours"),
    "MTP modules": ("1", "the main stages train one (section 2)"),
    "tokens": ("20 x active parameters", "Hoffmann et al. 2022 (arXiv:2203.15556), for dense models"),
    "training FLOPs": ("3 x prefill FLOPs x tokens, without head", "forward once, backward twice"),
    "batch tokens": ("0.2920 x FLOPs^0.3271", "DeepSeek LLM 2024 (arXiv:2401.02954), for dense models"),
    "peak learning rate": (
        "0.3118 x FLOPs^-0.1250",
        "the same; Muon keeps AdamW's rates by its scale (arXiv:2502.16982)",
    ),
    "final learning rate": ("peak / 5", "the report's stage 1: 2.5e-4 to 5e-5"),
}
"""What each figure follows, and where that comes from."""


@dataclass(frozen=True)
class Suggestion:
    """Settings of pre-training from scratch."""

    tokens: int
    flops: float
    """Forward and backward, without embedding and output head."""
    batch_tokens: int
    """A multiple of `CONTEXT`."""
    steps: int
    lr: float
    final_lr: float

    @property
    def extrapolates(self) -> bool:
        """Whether the batch and rate laws were fitted elsewhere (`RANGE_FLOPS`)."""
        return not RANGE_FLOPS[0] <= self.flops <= RANGE_FLOPS[1]


def scale_layers(name: str) -> int | None:
    """Return N of "scale-N", None for another name."""
    found = re.fullmatch(r"scale-(\d+)", name)
    return int(found[1]) if found else None


def scale(layers: int) -> ModelConfig:
    """Return the model with `layers` trunk layers by `LAWS`; raise `ConfigError` outside LEAST..MOST."""
    if not LEAST <= layers <= MOST:
        raise ConfigError(f"scale-{layers}: the dial takes {LEAST} to {MOST} trunk layers; choose one of them.")
    width = _near(layers * 4096 / 45, 128)
    head_dim = 128 if width >= 1024 else 64
    heads = _near(2 * width / head_dim, 8 if 2 * width < 64 * head_dim else 16)
    groups = max(count for count in (1, 2, 4, 8) if count <= heads // 8)
    expert = _near(0.3125 * width, 64)
    return s3f1(
        layers=layers, dense=max(1, round(layers / 15)), mtp=1,
        heads=heads, sliding_heads=heads * 3 // 2, groups=groups, head_dim=head_dim,
        clips={layers - 2: 7.0, layers - 1: 7.0}, clips_shared={layers - 1: 16.0},
        vocab_size=_near(layers * 128_896 / 45, 128), hidden_size=width, intermediate_size=_near(2.75 * width, 128),
        sliding_window=512, moe_num_experts=min(288, _near(layers * 288 / 45, 32)), moe_top_k=8,
        moe_intermediate_size=expert, share_expert_dim=expert, moe_router_scaling_factor=3.0,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip


def suggest_training(config: ModelConfig) -> Suggestion:
    """Return settings to pre-train `config`'s trunk from scratch, by `LAWS`."""
    tokens = TOKENS_PER_PARAMETER * active_parameters(config)
    head = 2.0 * config.vocab_size * config.hidden_size
    flops = 3 * (cost(config, CONTEXT).prefill_flops - head) * tokens
    batch = _near(0.2920 * flops**0.3271, CONTEXT)
    lr = 0.3118 * flops**-0.1250
    return Suggestion(
        tokens=tokens, flops=flops, batch_tokens=batch, steps=max(1, round(tokens / batch)), lr=lr, final_lr=lr / 5
    )


def _near(value: float, multiple: int) -> int:
    """Return the multiple nearest to `value`, at least one."""
    return max(1, round(value / multiple)) * multiple
