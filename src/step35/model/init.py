"""Initial weights: truncated normal by fan-in, residual outputs scaled down by depth, small heads."""

from __future__ import annotations

import torch
from torch import nn

from step35.model.step35 import Step35


def initialise(model: Step35, generator: torch.Generator) -> None:
    """Fill every parameter in place, in a fixed order, from `generator`.

    Matrices get standard deviation 1/sqrt(fan-in); what writes into the residual stream (o_proj, down_proj) a
    further 1/sqrt(2 * layers); heads start small so that the first loss is near log(vocabulary).
    """
    residual = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.zero_()
                continue
            std = parameter.shape[-1] ** -0.5
            if name == "embed_tokens.weight":
                std = 0.5
            elif "head" in name:
                std *= 0.2
            elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                std *= residual
            nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)
        for buffer in model.buffers():
            buffer.zero_()


def clone_mtp(model: Step35, source: int = 0) -> None:
    """Copy MTP module `source` into all later ones (section 2: MTP-2 and MTP-3 are cloned from MTP-1)."""
    state = model.mtp[source].state_dict()
    for module in model.mtp[source + 1 :]:
        module.load_state_dict(state)


def grow_mtp(model: Step35, modules: int) -> Step35:
    """Return a copy of `model` (fp32) with `modules` MTP modules, the new ones cloned from the first."""
    grown = Step35(model.config.with_mtp(modules))
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in grown.state_dict()}
    grown.load_state_dict(kept, strict=False)
    for k in range(len(model.mtp), modules):
        grown.mtp[k].load_state_dict(model.mtp[0].state_dict())
    grown.compute_dtype = model.compute_dtype
    return grown.train(model.training)
