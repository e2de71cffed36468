"""The mixture-of-experts FFN: routed experts plus one shared expert, summed without further weights (section 2)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from step35.config.model import LayerConfig, ModelConfig
from step35.model.context import Context, Routing
from step35.model.experts import Experts
from step35.model.mlp import MLP
from step35.model.router import Router


class MoE(nn.Module):
    """ffn(x) = shared(x) + sum over the chosen experts of weight * expert(x)."""

    def __init__(self, layer: LayerConfig, config: ModelConfig) -> None:
        super().__init__()
        self.index = layer.index
        self.router = Router(
            config.hidden_size, config.moe_num_experts, config.moe_top_k, config.moe_router_scaling_factor
        )
        self.experts = Experts(config.hidden_size, config.moe_intermediate_size, config.moe_num_experts, layer.clip)
        self.shared = MLP(config.hidden_size, config.share_expert_dim, layer.clip_shared)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        weights_NK, chosen_NK, probabilities_NE = self.router(x_ND)
        if context.routing is None:
            routed = self.experts(x_ND, weights_NK, chosen_NK)
        else:
            context.routing.append(Routing(self.index, probabilities_NE, chosen_NK))
            watching = context.observer is not None
            observe = partial(context.observer.experts, self.index, self.experts.clip) if watching else None
            routed = self.experts.grouped(x_ND, weights_NK, chosen_NK, observe)
        shared = self.shared(x_ND, context.observe_dense(self.index, self.shared.clip))
        return (routed + shared).view_as(x_BTD)
