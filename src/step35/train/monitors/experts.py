"""Expert health: load, norms and activations per layer and expert (section 4.1, second and third).

Load statistics alone miss both failure modes: an expert may be routed to and yet be dead (falling min-to-median
norm), or grow without bound while the loss stays flat (rising max-to-median activation).
"""

# E experts

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from step35.model.context import Routing
from step35.train.balance import expert_counts


def load_metrics(routing: list[Routing]) -> dict[str, float]:
    """Return the mean coefficient of variation of load, the number of idle experts, and the share clipped."""
    shares = [expert_counts(r).float() / r.experts_NK.numel() for r in routing]
    return {
        "load_cv": float(torch.stack([s.std(unbiased=False) / s.mean() for s in shares]).mean()),
        "dead_experts": int(sum(int((s == 0).sum()) for s in shares)),
        "clip_share": float(torch.stack([r.clipped for r in routing if r.clipped is not None]).mean()),
        "routing_confidence": float(torch.stack([_confidence(r) for r in routing]).mean()),
    }


def _confidence(routing: Routing) -> Tensor:
    """Mean share of the routing probability that the chosen experts hold (section 6, routing confidence)."""
    p = routing.probabilities_NE.detach()
    return (p.gather(1, routing.experts_NK).sum(-1) / p.sum(-1)).mean()


@torch.no_grad()
def panels(routing: list[Routing], model: nn.Module) -> dict[str, Any]:
    """Return the layer x expert panels: load share, activation RMS, and Frobenius norm of the output projection."""
    norms = [
        parameter.float().norm(dim=(1, 2))
        for name, parameter in model.named_parameters()
        if name.endswith("experts.down_proj")
    ]
    return {
        "expert_load": [(expert_counts(r) / r.experts_NK.numel()).tolist() for r in routing],
        "expert_rms": [r.expert_rms_E.tolist() for r in routing if r.expert_rms_E is not None],
        "expert_norm": [norm.tolist() for norm in norms],
    }
