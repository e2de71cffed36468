"""Names: which released tensor (or rows of which packed tensor) each of our parameters holds.

One table serves three readers: loading, saving, and the optimiser, which must treat the parts of a packed matrix
as the separate matrices they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from step35.config.model import LayerConfig, ModelConfig

FP32_NAMES = ("moe.gate.weight", "moe.router_bias")
"""Released tensors that stay fp32 whatever the checkpoint's dtype: rounding them flips expert choices."""


@dataclass(frozen=True)
class Part:
    """A slice of one of our tensors that is one tensor in the released layout."""

    released: str
    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0

    @property
    def length(self) -> int:
        """Extent along `dim`."""
        return self.shape[self.dim]


Layout = dict[str, tuple[Part, ...]]


def layout(config: ModelConfig) -> Layout:
    """Map each name in the model's state dict to its released parts, in order along the packed dimension."""
    D, V = config.hidden_size, config.vocab_size
    table: Layout = {
        "embed_tokens.weight": (Part("model.embed_tokens.weight", (V, D)),),
        "norm.weight": (Part("model.norm.weight", (D,)),),
        "lm_head.weight": (Part("lm_head.weight", (V, D)),),
    }
    for i in range(config.num_hidden_layers):
        table.update(_block(f"layers.{i}.", config, config.layer(i)))
    for k in range(config.num_nextn_predict_layers):
        layer = config.layer(config.num_hidden_layers + k)
        released = f"model.layers.{layer.index}."
        table.update(_block(f"mtp.{k}.block.", config, layer))
        table |= {
            f"mtp.{k}.embedding_norm.weight": (Part(released + "enorm.weight", (D,)),),
            f"mtp.{k}.hidden_norm.weight": (Part(released + "hnorm.weight", (D,)),),
            f"mtp.{k}.joint_proj.weight": (Part(released + "eh_proj.weight", (D, 2 * D)),),
            f"mtp.{k}.norm.weight": (Part(released + "transformer.shared_head.norm.weight", (D,)),),
            f"mtp.{k}.head.weight": (Part(released + "transformer.shared_head.output.weight", (V, D)),),
        }
    return table


def _block(ours: str, config: ModelConfig, layer: LayerConfig) -> Layout:
    D, C = config.hidden_size, layer.head_dim
    q_rows, kv_rows = layer.heads * C, layer.kv_heads * C
    released = f"model.layers.{layer.index}."
    attention = released + "self_attn."
    table: Layout = {
        ours + "attention_norm.weight": (Part(released + "input_layernorm.weight", (D,)),),
        ours + "ffn_norm.weight": (Part(released + "post_attention_layernorm.weight", (D,)),),
        ours + "attention.qkv_proj.weight": (
            Part(attention + "q_proj.weight", (q_rows, D)),
            Part(attention + "k_proj.weight", (kv_rows, D), start=q_rows),
            Part(attention + "v_proj.weight", (kv_rows, D), start=q_rows + kv_rows),
        ),
        ours + "attention.gate_proj.weight": (Part(attention + "g_proj.weight", (layer.heads, D)),),
        ours + "attention.o_proj.weight": (Part(attention + "o_proj.weight", (D, q_rows)),),
        ours + "attention.q_norm.weight": (Part(attention + "q_norm.weight", (C,)),),
        ours + "attention.k_norm.weight": (Part(attention + "k_norm.weight", (C,)),),
    }
    if not layer.moe:
        return table | _mlp(ours + "mlp.", released + "mlp.", D, config.intermediate_size)
    E, I = config.moe_num_experts, config.moe_intermediate_size
    table |= {
        ours + "moe.router.weight": (Part(released + "moe.gate.weight", (E, D)),),
        ours + "moe.router.bias": (Part(released + "moe.router_bias", (E,)),),
        ours + "moe.experts.gate_up_proj": (
            Part(released + "moe.gate_proj.weight", (E, I, D), dim=1),
            Part(released + "moe.up_proj.weight", (E, I, D), dim=1, start=I),
        ),
        ours + "moe.experts.down_proj": (Part(released + "moe.down_proj.weight", (E, D, I)),),
    }
    return table | _mlp(ours + "moe.shared.", released + "share_expert.", D, config.share_expert_dim)


def _mlp(ours: str, released: str, D: int, F: int) -> Layout:
    return {
        ours + "gate_up_proj.weight": (
            Part(released + "gate_proj.weight", (F, D)),
            Part(released + "up_proj.weight", (F, D), start=F),
        ),
        ours + "down_proj.weight": (Part(released + "down_proj.weight", (D, F)),),
    }


def released_parts(config: ModelConfig) -> Iterator[tuple[str, Part]]:
    """Yield (our name, part) for every released tensor."""
    for name, parts in layout(config).items():
        for part in parts:
            yield name, part
