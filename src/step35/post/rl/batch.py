"""Trajectories as tensors, and the quantities that actor, MTP modules and critic give for them."""

# B responses  T tokens  D model  V vocab

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from step35.api.trajectory import Trajectory
from step35.model.context import Context
from step35.model.step35 import Step35
from step35.train.loss import mtp_losses, scored


@dataclass(frozen=True)
class TrajectoryBatch:
    """Padded trajectories. Column t of every (B, T) quantity belongs to token t, seen from state s_t = tokens < t."""

    tokens_BT: Tensor
    segments_BT: Tensor
    mask_BT: Tensor
    """True where the policy chose token t."""
    infer_BT: Tensor
    """The sampler's log-probabilities."""
    rewards_B: Tensor
    truncated_B: Tensor
    lengths_B: Tensor

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], pad_id: int) -> TrajectoryBatch:
        """Pad to the longest; trajectories without a verdict (reward None) must have been dropped before."""
        longest = max(len(t.tokens) for t in trajectories)

        def padded(rows: list[list[int]] | list[list[float]] | list[list[bool]], fill: float) -> Tensor:
            return torch.stack([F.pad(torch.tensor(row), (0, longest - len(row)), value=fill) for row in rows])

        return cls(
            tokens_BT=padded([t.tokens for t in trajectories], pad_id),
            segments_BT=padded([[0] * len(t.tokens) for t in trajectories], -1),
            mask_BT=padded([t.mask for t in trajectories], False),
            infer_BT=padded([t.logprobs for t in trajectories], 0.0),
            rewards_B=torch.tensor([float(t.reward or 0.0) for t in trajectories]),
            truncated_B=torch.tensor([t.truncated for t in trajectories]),
            lengths_B=torch.tensor([len(t.tokens) for t in trajectories]),
        )

    def to(self, device: torch.device) -> TrajectoryBatch:
        """Return the batch on `device`."""
        return TrajectoryBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def rows(self, index: Tensor) -> TrajectoryBatch:
        """Return the trajectories `index`, cut to the longest of them."""
        longest = int(self.lengths_B[index].max())
        return TrajectoryBatch(
            tokens_BT=self.tokens_BT[index, :longest],
            segments_BT=self.segments_BT[index, :longest],
            mask_BT=self.mask_BT[index, :longest],
            infer_BT=self.infer_BT[index, :longest],
            rewards_B=self.rewards_B[index],
            truncated_B=self.truncated_B[index],
            lengths_B=self.lengths_B[index],
        )


def token_logprobs(model: Step35, batch: TrajectoryBatch) -> tuple[Tensor, Tensor]:
    """Return log pi(a_t | s_t) and the policy's entropy at s_t, each (B, T), 0 where the policy did not act."""
    h_BTD = model.trunk(batch.tokens_BT, Context.packed(batch.tokens_BT, batch.segments_BT))
    acts = batch.mask_BT[:, 1:]
    logits_NV = model.logits(h_BTD[:, :-1][acts])
    log_p_NV = logits_NV.log_softmax(-1)
    chosen_N = log_p_NV.gather(1, batch.tokens_BT[:, 1:][acts][:, None])[:, 0]
    with torch.no_grad():
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    return _placed(chosen_N, batch.mask_BT), _placed(entropy_N, batch.mask_BT)


def draft_losses(model: Step35, batch: TrajectoryBatch) -> list[Tensor]:
    """Return each MTP module's mean loss in nats on the tokens that the policy chose; the trunk is left out of it."""
    context = Context.packed(batch.tokens_BT, batch.segments_BT)
    with torch.no_grad():
        h_BTD = model.trunk(batch.tokens_BT, context)
    sums = mtp_losses(model, batch.tokens_BT, h_BTD, context, batch.segments_BT, batch.mask_BT)
    counts = [scored(batch.segments_BT, batch.mask_BT, k + 2).sum().clamp(min=1) for k in range(len(sums))]
    return [total / count for total, count in zip(sums, counts, strict=True)]


def state_values(critic: Step35, batch: TrajectoryBatch) -> tuple[Tensor, Tensor]:
    """Return V(s_t) (B, T), 0 where the policy did not act, and V of the state after the last token (B,)."""
    h_BTD = critic.trunk(batch.tokens_BT, Context.packed(batch.tokens_BT, batch.segments_BT))
    values_BT = critic.logits(h_BTD)[..., 0]
    final_B = values_BT[torch.arange(len(values_BT), device=values_BT.device), batch.lengths_B - 1]
    shifted = F.pad(values_BT[:, :-1], (1, 0))
    return torch.where(batch.mask_BT, shifted, torch.zeros_like(shifted)), final_B


def _placed(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Put one value per acted token back at its (row, column)."""
    return torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask_BT, values_N)
