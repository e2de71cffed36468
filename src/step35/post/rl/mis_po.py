"""MIS-PO: Metropolis independence sampling filtered policy optimisation (report section 6, eq. 2).

The inference policy is the proposal, the training policy the target. Instead of weighting by the importance ratio
x_t = pi_old(a_t) / pi_infer(a_t), a 0/1 filter keeps tokens whose ratio, and responses whose geometric mean of
ratios, lies in a narrow band; what passes is treated as on-policy:

    L = - mean over kept tokens of log pi_theta(a_t | s_t) * A_t

Eq. 2 is an expectation over all of the sampler's tokens, filtered ones counting as 0. Here the mean runs over kept
tokens only: a filtered token counts neither above nor below the line, so the step does not shrink with acceptance.
"""

# B responses  T tokens

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from step35.config.rl import MISPOConfig


@dataclass(frozen=True)
class Filter:
    """Which tokens may teach: `kept_BT` is inside the mask, in a response and at a token within both bands."""

    kept_BT: Tensor
    diagnostics: dict[str, float]


def mis_filter(old_BT: Tensor, infer_BT: Tensor, mask_BT: Tensor, config: MISPOConfig) -> Filter:
    """Compare log-probabilities of the training policy (`old_BT`) and of the sampler (`infer_BT`)."""
    log_ratio_BT = torch.where(mask_BT, old_BT - infer_BT, torch.zeros_like(old_BT))
    counts_B = mask_BT.sum(-1).clamp(min=1)
    ratio_BT = log_ratio_BT.exp()
    trajectory_B = (log_ratio_BT.sum(-1) / counts_B).exp()
    token_ok_BT = (ratio_BT >= config.token_low) & (ratio_BT <= config.token_high) & mask_BT
    trajectory_ok_B = (trajectory_B >= config.trajectory_low) & (trajectory_B <= config.trajectory_high)
    seen = ratio_BT[mask_BT]
    diagnostics = {
        "accept_tokens": float(token_ok_BT.sum() / mask_BT.sum().clamp(min=1)),
        "accept_trajectories": float(trajectory_ok_B.float().mean()),
        "ratio_mean": float(seen.mean()) if len(seen) else 1.0,
        "ratio_min": float(seen.min()) if len(seen) else 1.0,
        "ratio_max": float(seen.max()) if len(seen) else 1.0,
        "kl": float((seen - 1 - seen.log()).mean()) if len(seen) else 0.0,
    }
    return Filter(token_ok_BT & trajectory_ok_B[:, None], diagnostics)


def mis_po_loss(logprobs_BT: Tensor, advantages_BT: Tensor, kept_BT: Tensor) -> Tensor:
    """Return the policy loss; gradients flow through `logprobs_BT` only."""
    taught = torch.where(kept_BT, logprobs_BT * advantages_BT.detach(), torch.zeros_like(logprobs_BT))
    return -taught.sum() / kept_BT.sum().clamp(min=1)
