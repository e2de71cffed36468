"""fp32 masters of bf16 weights: what the optimisers update, so that steps too small for bf16 add up all the same.

bf16 has 8 bits of precision: a weight does not feel an update smaller than 1/512 of itself, and late in training
nearly all are. So each bf16 weight W has an fp32 master M. A micro-batch's bf16 gradient is added to M's fp32
gradient as soon as it is complete, the optimiser steps M, and W <- bf16(M).

Against fp32 weights that are rounded at every use (the default) this saves the rounding, 6 bytes of traffic a weight
and micro-batch, and reduces each micro-batch's gradient to bf16. Memory is the same: autograd keeps the rounded copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from step35.model.step35 import Step35
from step35.model.weights import set_dtypes


class Masters:
    """The fp32 weights of a model; `named` has them by name, for the optimisers.

    Parameters that are fp32 (all of them at dtype float32, the router always) are their own masters.
    """

    def __init__(self, model: Step35, dtype: torch.dtype) -> None:
        exact = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
        set_dtypes(model, dtype)
        self.named = dict(model.named_parameters())
        self.rounded = {name: p for name, p in self.named.items() if p.dtype != torch.float32}
        for name, parameter in self.rounded.items():
            master = nn.Parameter(exact[name], requires_grad=parameter.requires_grad)
            self.named[name] = master
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_hand_over, master))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model, after an update."""
        for name, parameter in self.rounded.items():
            parameter.copy_(self.named[name])

    @torch.no_grad()
    def adopt(self) -> None:
        """Take up weights that were changed in the model itself, such as cloned MTP modules."""
        for name, parameter in self.rounded.items():
            master = self.named[name]
            master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter.float()))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masters of rounded weights under the weights' own names: a checkpoint holds these instead."""
        return {name: self.named[name].detach() for name in self.rounded}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a checkpoint's weights; the model is to load them as well."""
        for name in self.rounded:
            self.named[name].copy_(state[name])


def _hand_over(master: Tensor, parameter: Tensor) -> None:
    """Add a complete gradient to the master's, and drop it."""
    gradient = parameter.grad
    assert gradient is not None
    master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None
