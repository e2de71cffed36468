"""The architecture once more, by brute force: from a checkpoint's released names to logits, one sequence, in float64.

Written from the description of the released layout and its arithmetic, not from `step35.model`, and sharing no code
with it: an error would have to be made twice to pass unseen. Plain loops over heads, tokens and experts stand where the
package batches, caches and sorts. What an implementation could get wrong is a field of `Conventions`;
`test_mutations.py` changes one at a time and asks that the logits move.

Not here: `use_rope_layers` (empty in the release), biases of projections (there are none), bf16 arithmetic (weights
stored in bf16 are widened), caches, several sequences at once.
"""

# T positions  D model  H query heads  K kv heads  C head dim  R rotary pairs  E experts  V vocabulary

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.torch import load_file  # numpy has no bfloat16, so torch reads the file; nothing is computed with it

Array = np.ndarray


@dataclass(frozen=True)
class Conventions:
    """Each field's default is what the released model does."""

    # norms: x / rms(x) * (norm_offset + w)
    norm_offset: float = 1.0
    norm_eps: float | None = None  # None: rms_norm_eps of the config
    qk_norm: Literal["before rope", "after rope", "absent"] = "before rope"
    # rope
    rope_scaling: Literal["yarn_only_types", "all layers", "no layer"] = "yarn_only_types"
    rope_blend: Literal["in turns", "in log turns", "divide all"] = "in turns"  # llama3's, YaRN's, linear scaling
    one_theta: float | None = None  # None: rope_theta of the layer
    partial_rotary: bool = True  # False: all channels of all layers turn
    rope_exponent: Literal["rotary channels", "head channels"] = "rotary channels"  # what 2j is divided by
    rope_pairs: Literal["half-split", "interleaved"] = "half-split"
    # attention
    window_change: int = 0  # a sliding layer's query sees sliding_window + window_change keys, its own included
    kv_heads: Literal["consecutive", "strided"] = "consecutive"  # query head h reads h // (H / K), not h % K
    head_gate: Literal["of normed input", "of raw input", "absent"] = "of normed input"
    # clip of silu(gate) and up at a layer's limit
    clip_routed: bool = True
    clip_shared: bool = True
    clip_dense: bool = True  # at the layer's limit of shared experts
    clip_gate: Literal["after silu", "before silu"] = "after silu"
    clip_gate_below: bool = False
    clip_up_below: bool = True
    swap_limits: bool = False  # swiglu_limits for the shared expert, swiglu_limits_shared for the routed ones
    # router
    router_activation: Literal["sigmoid", "softmax"] = "sigmoid"
    router_rounding: Literal["none", "weights to bf16", "input to bf16", "logits to bf16"] = "none"
    router_bias: Literal["selects", "selects and weighs", "absent"] = "selects"
    renormalise: bool = True
    routed_scale: bool = True
    # multi-token prediction
    mtp_input: Literal["before final norm", "after final norm"] = "before final norm"
    mtp_chain: Literal["raw", "normed"] = "raw"
    mtp_joint: Literal["embedding, hidden", "hidden, embedding"] = "embedding, hidden"
    mtp_norm: Literal["own", "trunk's"] = "own"
    mtp_head: Literal["own", "trunk's"] = "own"


@dataclass(frozen=True)
class Reference:
    """A checkpoint, and how it is read."""

    config: dict[str, Any]
    weights: dict[str, Array]
    rules: Conventions = Conventions()

    def logits(self, ids: Array) -> tuple[Array, list[Array]]:
        """Return the logits (T, V) of `ids` (T,), and those of MTP module k, (T - 1 - k, V), teacher-forced.

        Row t of module k joins the embedding of token t + 1 + k with state t of module k - 1 (of the trunk for k = 0).
        """
        layers = self.config["num_hidden_layers"]
        embedding_VD = self.weights["model.embed_tokens.weight"]
        x_TD = embedding_VD[ids]
        for layer in range(layers):
            x_TD = self.block(x_TD, layer)
        normed_TD = self.norm(x_TD, "model.norm")
        logits_TV = self.linear(normed_TD, "lm_head")
        drafts = []
        if self.rules.mtp_input == "after final norm":
            x_TD = normed_TD
        for k in range(self.config["num_nextn_predict_layers"]):
            name = f"model.layers.{layers + k}"
            ahead_TD = self.norm(embedding_VD[ids[k + 1 :]], f"{name}.enorm")
            hidden_TD = self.norm(x_TD[: len(ids) - 1 - k], f"{name}.hnorm")
            joint = [ahead_TD, hidden_TD] if self.rules.mtp_joint == "embedding, hidden" else [hidden_TD, ahead_TD]
            x_TD = self.block(self.linear(np.concatenate(joint, axis=1), f"{name}.eh_proj"), layers + k)
            shared = f"{name}.transformer.shared_head"
            normed_TD = self.norm(x_TD, f"{shared}.norm" if self.rules.mtp_norm == "own" else "model.norm")
            drafts.append(self.linear(normed_TD, f"{shared}.output" if self.rules.mtp_head == "own" else "lm_head"))
            if self.rules.mtp_chain == "normed":
                x_TD = normed_TD
        return logits_TV, drafts

    def block(self, x_TD: Array, layer: int) -> Array:
        """Return the residual stream (T, D) after a layer's attention and its feed-forward part."""
        name = f"model.layers.{layer}"
        x_TD = x_TD + self.attention(self.norm(x_TD, f"{name}.input_layernorm"), x_TD, layer)
        y_TD = self.norm(x_TD, f"{name}.post_attention_layernorm")
        routed, shared = self.config["swiglu_limits"][layer], self.config["swiglu_limits_shared"][layer]
        if f"{name}.moe.gate.weight" not in self.weights:
            return x_TD + self.mlp(y_TD, f"{name}.mlp", shared if self.rules.clip_dense else 0)
        if self.rules.swap_limits:
            routed, shared = shared, routed
        shared_TD = self.mlp(y_TD, f"{name}.share_expert", shared if self.rules.clip_shared else 0)
        return x_TD + shared_TD + self.experts(y_TD, f"{name}.moe", routed if self.rules.clip_routed else 0)

    def attention(self, y_TD: Array, x_TD: Array, layer: int) -> Array:
        """Return o_proj of the gated heads, (T, D), from the normed input `y_TD`; `x_TD` is it before the norm."""
        name = f"model.layers.{layer}.self_attn"
        T, C = len(y_TD), self.config["head_dim"]
        q_THC = self.linear(y_TD, f"{name}.q_proj").reshape(T, -1, C)
        k_TKC = self.linear(y_TD, f"{name}.k_proj").reshape(T, -1, C)
        v_TKC = self.linear(y_TD, f"{name}.v_proj").reshape(T, -1, C)
        H, K = q_THC.shape[1], k_TKC.shape[1]
        if self.rules.qk_norm == "before rope":
            q_THC, k_TKC = self.norm(q_THC, f"{name}.q_norm"), self.norm(k_TKC, f"{name}.k_norm")
        q_THC, k_TKC = self.rope(q_THC, layer), self.rope(k_TKC, layer)
        if self.rules.qk_norm == "after rope":
            q_THC, k_TKC = self.norm(q_THC, f"{name}.q_norm"), self.norm(k_TKC, f"{name}.k_norm")
        sliding = self.config["layer_types"][layer] == "sliding_attention"
        window = self.config["sliding_window"] + self.rules.window_change if sliding else T
        distance_TT = np.arange(T)[:, None] - np.arange(T)
        unseen_TT = (distance_TT < 0) | (distance_TT >= window)
        out_THC = np.zeros_like(q_THC)
        for h in range(H):
            kv = h // (H // K) if self.rules.kv_heads == "consecutive" else h % K
            scores_TT = q_THC[:, h] @ k_TKC[:, kv].T / np.sqrt(C)
            scores_TT[unseen_TT] = -np.inf
            out_THC[:, h] = softmax(scores_TT) @ v_TKC[:, kv]
        if self.rules.head_gate != "absent":
            gate_TH = self.linear(y_TD if self.rules.head_gate == "of normed input" else x_TD, f"{name}.g_proj")
            out_THC *= sigmoid(gate_TH)[:, :, None]
        return self.linear(out_THC.reshape(T, H * C), f"{name}.o_proj")

    def rope(self, x_THC: Array, layer: int) -> Array:
        """Turn pair j of each head's channels at position t by the angle t * frequency[j]; other channels stay."""
        frequencies_R = self.frequencies(layer)
        pairs = len(frequencies_R)
        first, second = np.arange(pairs), np.arange(pairs) + pairs
        if self.rules.rope_pairs == "interleaved":
            first, second = 2 * np.arange(pairs), 2 * np.arange(pairs) + 1
        angles_T1R = np.arange(len(x_THC))[:, None, None] * frequencies_R
        a_THR, b_THR = x_THC[:, :, first], x_THC[:, :, second]
        turned_THC = x_THC.copy()
        turned_THC[:, :, first] = a_THR * np.cos(angles_T1R) - b_THR * np.sin(angles_T1R)
        turned_THC[:, :, second] = b_THR * np.cos(angles_T1R) + a_THR * np.sin(angles_T1R)
        return turned_THC

    def frequencies(self, layer: int) -> Array:
        """Return a layer's frequencies (R,), theta^(-2j / 2R), slowed by the llama3 rule where it applies."""
        theta = self.rules.one_theta or self.config["rope_theta"][layer]
        share = self.config["partial_rotary_factors"][layer] if self.rules.partial_rotary else 1.0
        rotary = int(self.config["head_dim"] * share)
        divisor = rotary if self.rules.rope_exponent == "rotary channels" else self.config["head_dim"]
        frequencies_R = theta ** (-2 * np.arange(rotary // 2) / divisor)
        listed = self.config["layer_types"][layer] in self.config["yarn_only_types"]
        if self.rules.rope_scaling == "all layers" or (self.rules.rope_scaling == "yarn_only_types" and listed):
            frequencies_R = np.array([self.slowed(frequency) for frequency in frequencies_R])
        return frequencies_R

    def slowed(self, frequency: float) -> float:
        """Keep what turns often in the original context, divide what turns hardly once, blend between the two."""
        scaling = self.config["rope_scaling"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if self.rules.rope_blend == "in log turns":
            turns, low, high = np.log(turns), np.log(low), np.log(high)
        kept = 0 if self.rules.rope_blend == "divide all" else np.clip((turns - low) / (high - low), 0, 1)
        return kept * frequency + (1 - kept) * frequency / scaling["factor"]

    def experts(self, y_TD: Array, name: str, limit: float) -> Array:
        """Return each token's weighted sum of its chosen experts, (T, D)."""
        weight_ED, bias_E = self.weights[f"{name}.gate.weight"], self.weights[f"{name}.router_bias"]
        rounding = self.rules.router_rounding
        if rounding == "weights to bf16":
            weight_ED = to_bf16(weight_ED)
        scores_TE = (to_bf16(y_TD) if rounding == "input to bf16" else y_TD) @ weight_ED.T
        if rounding == "logits to bf16":
            scores_TE = to_bf16(scores_TE)
        out_TD = np.zeros_like(y_TD)
        for t, scores_E in enumerate(scores_TE):
            weights_E = sigmoid(scores_E) if self.rules.router_activation == "sigmoid" else softmax(scores_E)
            preferences_E = weights_E if self.rules.router_bias == "absent" else weights_E + bias_E
            if self.rules.router_bias == "selects and weighs":
                weights_E = preferences_E
            chosen = np.argsort(-preferences_E)[: self.config["moe_top_k"]]
            total = weights_E[chosen].sum() if self.rules.renormalise else 1.0
            scale = self.config["moe_router_scaling_factor"] if self.rules.routed_scale else 1.0
            for expert in chosen:
                out_TD[t] += scale * weights_E[expert] / total * self.mlp(y_TD[t], name, limit, expert)
        return out_TD

    def mlp(self, y: Array, name: str, limit: float, expert: int | None = None) -> Array:
        """Return down(silu(gate(y)) * up(y)) with both factors clipped if `limit` is not 0, for `y` (..., D)."""
        gate, up = self.linear(y, f"{name}.gate_proj", expert), self.linear(y, f"{name}.up_proj", expert)
        above = limit or np.inf
        below = -above if self.rules.clip_gate_below else -np.inf
        if self.rules.clip_gate == "before silu":
            gate = np.clip(gate, below, above)
        activated = gate * sigmoid(gate)
        if self.rules.clip_gate == "after silu":
            activated = np.clip(activated, below, above)
        up = np.clip(up, -above if self.rules.clip_up_below else -np.inf, above)
        return self.linear(activated * up, f"{name}.down_proj", expert)

    def linear(self, x: Array, name: str, expert: int | None = None) -> Array:
        """Apply weights stored as (out, in), or as (expert, out, in)."""
        weight = self.weights[f"{name}.weight"]
        return x @ (weight if expert is None else weight[expert]).T

    def norm(self, x: Array, name: str) -> Array:
        """Return RMSNorm over the last axis, with the weight stored as its distance from one."""
        eps = self.config["rms_norm_eps"] if self.rules.norm_eps is None else self.rules.norm_eps
        scale = self.rules.norm_offset + self.weights[f"{name}.weight"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def read(folder: Path) -> Reference:
    """Read config.json and every safetensors file of a checkpoint, widened to float64."""
    config = json.loads((folder / "config.json").read_text())
    assert not config["use_rope_layers"], "not part of this reference"
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return Reference(config, {name: tensor.double().numpy() for name, tensor in tensors.items()})


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    """Return e^x over its sum along the last axis."""
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def to_bf16(x: Array) -> Array:
    """Round to the nearest bfloat16, the upper half of a float32, ties to even; return float64."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)
