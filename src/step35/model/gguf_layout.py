"""GGUF's words for this model: tensor names and metadata of llama.cpp's architecture "step35".

Released tensors keep their shapes; norms are stored as 1 + w. Scaled rotary frequencies are a tensor, `rope_freqs`.
What this format cannot say is refused by `metadata`, not written wrongly.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from step35.config.model import FULL, SLIDING, LayerConfig, ModelConfig, RopeScaling
from step35.errors import ConfigError
from step35.model.rope import scale_llama3

ARCHITECTURE = "step35"
ROPE_FREQUENCIES = "rope_freqs.weight"
RELEASED_CONFIG = "step35.released_config"
"""Our own key: the released config.json as text, so that a file written here is read back without loss."""

WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.g_proj.weight": "attn_gate.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "moe.gate.weight": "ffn_gate_inp.weight",
    "moe.router_bias": "exp_probs_b.bias",
    "moe.gate_proj.weight": "ffn_gate_exps.weight",
    "moe.up_proj.weight": "ffn_up_exps.weight",
    "moe.down_proj.weight": "ffn_down_exps.weight",
    "share_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "share_expert.up_proj.weight": "ffn_up_shexp.weight",
    "share_expert.down_proj.weight": "ffn_down_shexp.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "transformer.shared_head.norm.weight": "nextn.shared_head_norm.weight",
    "transformer.shared_head.output.weight": "nextn.shared_head_head.weight",
}
_RELEASED_WHOLE = {theirs: ours for ours, theirs in WHOLE.items()}
_RELEASED_IN_LAYER = {theirs: ours for ours, theirs in IN_LAYER.items()}


def gguf_name(released: str) -> str:
    """Return GGUF's name of a released tensor."""
    if released in WHOLE:
        return WHOLE[released]
    layer, name = released.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{IN_LAYER[name]}"


def released_name(name: str) -> str:
    """Return the released name of a GGUF tensor, or `name` itself when there is none."""
    if name in _RELEASED_WHOLE:
        return _RELEASED_WHOLE[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{_RELEASED_IN_LAYER[rest]}" if rest in _RELEASED_IN_LAYER else name


def is_norm(released: str) -> bool:
    """Say whether GGUF stores the tensor as 1 + w."""
    return released.endswith("norm.weight")


def metadata(config: ModelConfig) -> dict[str, Any]:
    """Return the hyperparameters of `config` by their GGUF keys; per-layer lists count MTP layers too.

    `rope.dimension_count` is left out on purpose: llama.cpp derives the rotary channels of each kind of layer from
    `attention.key_length` and would halve a stated value again. Raises `ConfigError` for what it cannot express.
    """
    layers = config.layers()
    _check_expressible(config, layers)
    theta = {layer.kind: layer.rope_theta for layer in layers}
    values = {
        "block_count": config.total_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": [layer.heads for layer in layers],
        "attention.head_count_kv": [layer.kv_heads for layer in layers],
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [layer.window is not None for layer in layers],
        "rope.freq_base": theta.get("full", 10_000.0),
        "rope.freq_base_swa": theta.get("sliding", 10_000.0),
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": float(config.moe_router_scaling_factor),
        "swiglu_clamp_exp": [float(layer.clip) for layer in layers],
        "swiglu_clamp_shexp": [float(layer.clip_shared) for layer in layers],
    }
    if config.moe_layers_enum:
        values |= {
            "expert_count": config.moe_num_experts,
            "expert_used_count": config.moe_top_k,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.share_expert_dim,
            "leading_dense_block_count": min(config.moe_layers_enum),
            "moe_every_n_layers": 1,
        }
    if config.num_nextn_predict_layers:
        values["nextn_predict_layers"] = config.num_nextn_predict_layers
    named = {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}
    return named | {RELEASED_CONFIG: json.dumps(config.to_released(), ensure_ascii=False)}


def rope_frequencies(config: ModelConfig) -> Tensor | None:
    """Return the divisors of the full layers' inverse frequencies, padded with 1 to half a head; None unscaled."""
    full = next((la for la in map(config.layer, range(config.num_hidden_layers)) if la.window is None), None)
    if full is None or full.rope_scaling is None:
        return None
    plain = full.rope_theta ** -(torch.arange(0, full.rotary_dim, 2, dtype=torch.float64) / full.rotary_dim)
    divisors = plain / scale_llama3(plain, full.rope_scaling)
    return torch.cat([divisors, divisors.new_ones(full.head_dim // 2 - len(divisors))]).float()


def config_of(values: dict[str, Any], moe_layers: list[int], frequencies: Tensor | None) -> ModelConfig:
    """Return the config that GGUF metadata describes; `moe_layers` are the layers with a router.

    Files of other writers do not state the constants of the frequency scaling, only its effect, `frequencies`: the
    release's constants are tried, and `ConfigError` asks for a config.json when they do not give the same numbers.
    """
    if RELEASED_CONFIG in values:
        return ModelConfig.from_released(json.loads(values[RELEASED_CONFIG]))
    get = _Keys(values)
    total, modules = get("block_count"), get("nextn_predict_layers", 0)
    sliding = [bool(s) for s in get.per_layer("attention.sliding_window_pattern", total)]
    heads = get.per_layer("attention.head_count", total)
    groups = get.per_layer("attention.head_count_kv", total, heads)
    of_kind = {s: (h, g) for s, h, g in zip(sliding, heads, groups, strict=True)}
    full_heads = of_kind.get(False, of_kind.get(True))
    head_dim = get("attention.key_length")
    config = {
        "vocab_size": len(values.get("tokenizer.ggml.tokens", ())),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get.per_layer("feed_forward_length", total)[0],
        "num_hidden_layers": total - modules,
        "num_nextn_predict_layers": modules,
        "num_attention_heads": full_heads[0],
        "num_attention_groups": full_heads[1],
        "head_dim": head_dim,
        "layer_types": [SLIDING if s else FULL for s in sliding],
        "sliding_window": get("attention.sliding_window"),
        "rope_theta": [get("rope.freq_base_swa" if s else "rope.freq_base", 10_000.0) for s in sliding],
        "partial_rotary_factors": [1.0 if s else 0.5 for s in sliding],
        "yarn_only_types": [FULL],
        "moe_layers_enum": moe_layers,
        "moe_num_experts": get("expert_count", 0),
        "moe_top_k": get.per_layer("expert_used_count", total, 0)[-1],
        "moe_intermediate_size": get.per_layer("expert_feed_forward_length", total, 0)[-1],
        "share_expert_dim": get("expert_shared_feed_forward_length", 0),
        "moe_router_scaling_factor": get("expert_weights_scale", 0.0) or 1.0,  # 0 is "no scaling"
        "swiglu_limits": get.per_layer("swiglu_clamp_exp", total, 0.0),
        "swiglu_limits_shared": get.per_layer("swiglu_clamp_shexp", total, 0.0),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id", 0),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id", 1),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id", 1),
    }
    if True in of_kind and of_kind[True] != full_heads:
        config["attention_other_setting"] = {
            "attention_type": SLIDING,
            "num_attention_heads": of_kind[True][0],
            "num_attention_groups": of_kind[True][1],
            "head_dim": head_dim,
        }
    if frequencies is not None:
        config["rope_scaling"] = RopeScaling().model_dump()
    found = ModelConfig.from_released(config)
    expected = rope_frequencies(found)
    same = frequencies is None or (
        expected is not None
        and expected.shape == frequencies.shape
        and torch.allclose(expected, frequencies, rtol=1e-4)
    )
    if not same:
        raise ConfigError(
            f"{ROPE_FREQUENCIES} does not follow the release's rope_scaling ({config['rope_scaling']}), and GGUF "
            "does not state other constants; put the model's config.json beside the GGUF file."
        )
    return found


class _Keys:
    """Read the architecture's keys, with errors that name them."""

    def __init__(self, values: dict[str, Any]) -> None:
        if values.get("general.architecture") != ARCHITECTURE:
            found = values.get("general.architecture")
            raise ConfigError(f"the GGUF file holds a '{found}' model; only '{ARCHITECTURE}' is read.")
        self._values = values

    def __call__(self, key: str, default: Any = None) -> Any:
        value = self._values.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise ConfigError(f"the GGUF file lacks the key {ARCHITECTURE}.{key}; convert the model again.")
        return value

    def per_layer(self, key: str, layers: int, default: Any = None) -> list[Any]:
        value = self(key, default)
        values = value if isinstance(value, list) else [value] * layers
        return (values + [values[-1]] * layers)[:layers]


def _check_expressible(config: ModelConfig, layers: list[LayerConfig]) -> None:
    """Refuse what llama.cpp's `step35` fixes in code."""
    problems = []
    for layer in layers:
        share = 0.5 if layer.window is None else 1.0
        if layer.rotary_dim != share * layer.head_dim:
            problems.append(f"partial_rotary_factors[{layer.index}] must be {share} in a {layer.kind} layer")
        if layer.head_dim != config.head_dim:
            problems.append(f"layer {layer.index} has head_dim={layer.head_dim}; all must have {config.head_dim}")
        if layer.window is not None and layer.rope_scaling is not None:
            problems.append(f"rope_scaling reaches layer {layer.index}, a sliding one; yarn_only_types must not say so")
        if layer.index >= config.num_hidden_layers and max(layer.clip, layer.clip_shared) > 0:
            problems.append(f"MTP layer {layer.index} has a swiglu limit; MTP layers are not clipped")
    for kind in ("full", "sliding"):
        if len({layer.rope_theta for layer in layers if layer.kind == kind}) > 1:
            problems.append(f"{kind} layers have different rope_theta")
    if problems:
        raise ConfigError("GGUF cannot express this config:\n  " + "\n  ".join(dict.fromkeys(problems[:10])))
