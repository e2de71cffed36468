"""One pre-norm decoder block: h += attention(norm(h)); h += ffn(norm(h))."""

from __future__ import annotations

from torch import Tensor, nn

from step35.config.model import ModelConfig
from step35.model.attention import Attention
from step35.model.context import Context
from step35.model.mlp import MLP
from step35.model.moe import MoE
from step35.model.norm import RMSNorm


class Block(nn.Module):
    """Layer `index` of the config: full or sliding attention, dense or MoE feed-forward."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        layer = config.layer(index)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(layer, config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(layer, config) if layer.moe else None
        self.mlp = None if layer.moe else MLP(config.hidden_size, config.intermediate_size, layer.clip_shared)

    def forward(self, h_BTD: Tensor, context: Context) -> Tensor:
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), context)
        x_BTD = self.ffn_norm(h_BTD)
        if self.moe:
            return h_BTD + self.moe(x_BTD, context)
        return h_BTD + self.mlp(x_BTD, context.observe_dense(self.attention.layer.index, self.mlp.clip))
