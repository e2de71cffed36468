"""Returns and advantages with gamma = lambda = 1 (report section 6): A_t = R - V(s_t)."""

# B responses  T tokens

from __future__ import annotations

import torch
from torch import Tensor


def returns(rewards_B: Tensor, truncated_B: Tensor, final_values_B: Tensor) -> Tensor:
    """Return R (B,): the verdict, or for a truncated response the critic's value of its last state (eq. 3).

    Scoring a truncated response 0 would punish a policy for the context's length.
    """
    return torch.where(truncated_B, final_values_B, rewards_B)


def advantages(returns_B: Tensor, values_BT: Tensor, mask_BT: Tensor, negative_weight: float = 1.0) -> Tensor:
    """Return A (B, T): R - V(s_t) where the policy acted, 0 elsewhere; negative ones times `negative_weight`."""
    advantages_BT = torch.where(mask_BT, returns_B[:, None] - values_BT, torch.zeros_like(values_BT))
    return torch.where(advantages_BT < 0, negative_weight * advantages_BT, advantages_BT)
