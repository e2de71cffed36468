"""Keeping experts busy: the loss-free bias update and the EP-group balance loss (section 2, eq. 1)."""

# N tokens  E experts  K chosen  G groups

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from step35.model.context import Routing


def without_padding(routing: Sequence[Routing], segments_BT: Tensor) -> list[Routing]:
    """Return the records without the rows of padding tokens (segment -1), which must not count as load."""
    real_N = segments_BT.flatten() >= 0
    if bool(real_N.all()):
        return list(routing)
    return [replace(r, probabilities_NE=r.probabilities_NE[real_N], experts_NK=r.experts_NK[real_N]) for r in routing]


def expert_counts(routing: Routing) -> Tensor:
    """Return how many of the N*K choices fell on each expert (E,)."""
    return torch.bincount(routing.experts_NK.flatten(), minlength=routing.probabilities_NE.shape[1])


def group_balance_loss(routing: Routing, groups: int) -> Tensor:
    """Return G * sum_g f_g p_g (eq. 1): 1 when the groups share load and probability evenly.

    f_g is the share of choices and p_g the mean routing probability of the group's experts. The sigmoid scores are
    normalised over the experts first, so that p sums to 1 as f does. 0 without tokens.
    """
    probabilities_NE = routing.probabilities_NE / routing.probabilities_NE.sum(-1, keepdim=True)
    f_E = expert_counts(routing).float() / max(1, routing.experts_NK.numel())
    f_G = f_E.view(groups, -1).sum(-1)
    p_G = (probabilities_NE.sum(0) / max(1, len(probabilities_NE))).view(groups, -1).sum(-1)
    return groups * (f_G * p_G).sum()


@torch.no_grad()
def update_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """Move each expert's selection bias by `rate` against its load: up when under the mean, down when over."""
    bias_E += rate * torch.sign(counts_E.float().mean() - counts_E.float())
