"""What a configuration costs: parameters by part, cache bytes, FLOPs and bytes read for one token.

Formulas only, no model is built: counts for any size come at once, and tests hold them to the built model.
"""

from __future__ import annotations

from dataclasses import dataclass

from step35.config.model import LayerConfig, ModelConfig


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the model, in all and those that one token uses."""

    name: str
    total: int
    active: int


@dataclass(frozen=True)
class Cost:
    """What one token costs at position `context` (keys it may see, itself included)."""

    context: int
    cache_bytes: int
    """Keys and values of one sequence: full layers keep all tokens, sliding layers those in the window."""
    decode_flops: float
    """FLOPs of decoding the token at this position."""
    prefill_flops: float
    """FLOPs of a token on average over a prompt of this length."""
    read_bytes: int
    """Weights and cache read to decode one token at batch 1."""


def parts(config: ModelConfig) -> list[Part]:
    """Return the parameters by part; router biases, which no gradient moves, count as the checkpoint holds them."""
    width, vocabulary = config.hidden_size, config.vocab_size
    trunk, extra = config.trunk_layers(), config.layers()[config.num_hidden_layers :]
    moe, dense = [layer for layer in trunk if layer.moe], [layer for layer in trunk if not layer.moe]
    expert = 3 * width * config.moe_intermediate_size
    rows = [
        _whole("embedding", vocabulary * width),
        _whole("attention, full layers", sum(attention(config, la) for la in trunk if la.window is None)),
        _whole("attention, sliding layers", sum(attention(config, la) for la in trunk if la.window is not None)),
        _whole("dense FFN", len(dense) * 3 * width * config.intermediate_size),
        Part(
            "routed experts",
            len(moe) * config.moe_num_experts * expert,
            len(moe) * config.moe_top_k * expert,
        ),
        _whole("shared experts", len(moe) * 3 * width * config.share_expert_dim),
        _whole("routers", len(moe) * config.moe_num_experts * (width + 1)),
        _whole("norms", (2 * len(trunk) + 1) * width),
        _whole("output head", vocabulary * width),
        _whole("MTP, without heads", sum(mtp_module(config, layer) for layer in extra)),
        _whole("MTP heads", len(extra) * vocabulary * width),
    ]
    return [row for row in rows if row.total]


def attention(config: ModelConfig, layer: LayerConfig) -> int:
    """Return the parameters of one attention: q, k, v, output, gate and the two head norms."""
    queries, pairs = layer.heads * layer.head_dim, 2 * layer.kv_heads * layer.head_dim
    return config.hidden_size * (2 * queries + pairs + layer.heads) + 2 * layer.head_dim


def trunk_parameters(config: ModelConfig) -> int:
    """Return the parameters without MTP."""
    return sum(part.total for part in parts(config) if not part.name.startswith("MTP"))


def active_parameters(config: ModelConfig) -> int:
    """Return the trunk's parameters that one token uses, without embedding and output head (section 1)."""
    left_out = ("embedding", "output head")
    return sum(p.active for p in parts(config) if p.name not in left_out and not p.name.startswith("MTP"))


def cost(config: ModelConfig, context: int, *, weight_bytes: float = 2, cache_bytes: float = 2) -> Cost:
    """Return what one token of the trunk costs; a multiply-add is 2 FLOPs, scores and values 4 per head and key.

    Router, gate and output head are products like any other; softmax, norms and the embedding lookup are left out.
    """
    layers = config.trunk_layers()
    used = active_parameters(config) + config.vocab_size * config.hidden_size
    kept = sum(kept_elements(la, context) for la in layers)
    return Cost(
        context=context,
        cache_bytes=round(kept * cache_bytes),
        decode_flops=2.0 * used + sum(scores(la, context) for la in layers),
        prefill_flops=2.0 * used + sum(scores(la, context, mean=True) for la in layers),
        read_bytes=round(used * weight_bytes + kept * cache_bytes),
    )


def scores(layer: LayerConfig, context: int, *, mean: bool = False) -> float:
    """Return the FLOPs of a query's scores and values: the last of `context` tokens, or the mean of all."""
    return 4 * layer.heads * layer.head_dim * (_mean_seen(layer, context) if mean else _seen(layer, context))


def kept_elements(layer: LayerConfig, context: int) -> int:
    """Return the numbers in one sequence's keys and values: all tokens', or those in the window."""
    return 2 * layer.kv_heads * layer.head_dim * _seen(layer, context)


def _whole(name: str, count: int) -> Part:
    return Part(name, count, count)


def mtp_module(config: ModelConfig, layer: LayerConfig) -> int:
    """Return the parameters of an MTP module: joint projection, attention, dense FFN, and five norms."""
    width = config.hidden_size
    return 2 * width * width + attention(config, layer) + 3 * width * config.intermediate_size + 5 * width


def _seen(layer: LayerConfig, context: int) -> int:
    """Return the keys that the last of `context` tokens sees."""
    return context if layer.window is None else min(context, layer.window)


def _mean_seen(layer: LayerConfig, context: int) -> float:
    """Return the keys that a token sees on average over `context` tokens."""
    window = _seen(layer, context)
    return (window * (window + 1) / 2 + (context - window) * window) / context
