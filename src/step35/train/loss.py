"""Next-token and multi-token cross-entropy over packed rows.

The head and its softmax are computed in chunks, forward and gradient together, so that logits (N, V) never exist
at once: with a large vocabulary they would be the largest tensor of the step.
"""

# N scored positions  D model  V vocab  B rows  T tokens  M MTP modules

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step35.model.compiled.grouped import add_product
from step35.model.compiled.library import call, fits
from step35.model.context import Context
from step35.model.step35 import Step35

CHUNK_ROWS = 256
"""Positions whose logits exist at once; fewer would read the head's matrix more often than its products take."""

SMALLEST = torch.finfo(torch.float32).tiny
"""Floor of a target's probability: the loss of one token is at most 87 nats."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over N of -log softmax(h W^T)[target], with both gradients computed during the forward pass."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        """Return the summed loss in fp32."""
        weight = weight_VD.to(h_ND.dtype)
        grad_h = torch.empty_like(h_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        total = h_ND.new_zeros((), dtype=torch.float32)
        rows = min(CHUNK_ROWS, len(h_ND))
        buffer = h_ND.new_empty(rows, len(weight))  # reused: fresh pages cost more than the product that fills them
        for start in range(0, len(h_ND), max(1, rows)):
            h, target = h_ND[start : start + rows], targets_N[start : start + rows]
            logits = torch.mm(h, weight.T, out=buffer[: len(h)])
            loss_N, grad = _loss_and_gradient(logits, target)
            total += loss_N.sum()
            torch.mm(grad, weight, out=grad_h[start : start + rows])
            _add_product(grad_weight, grad, h)
        ctx.save_for_backward(grad_h, grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """Scale the stored gradients."""
        grad_h, grad_weight = ctx.saved_tensors
        return grad_h * grad_total.to(grad_h.dtype), grad_weight * grad_total, None


def _add_product(total_VD: Tensor, grad_NV: Tensor, h_ND: Tensor) -> None:
    """Add grad^T h to the fp32 gradient of the head."""
    if h_ND.dtype == torch.float32:
        total_VD.addmm_(grad_NV.T, h_ND)
    elif fits(h_ND) and fits(grad_NV):
        add_product(total_VD, grad_NV, h_ND.contiguous())
    else:
        total_VD.add_(grad_NV.T @ h_ND)


def _loss_and_gradient(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's loss in fp32 and the gradient of the logits, which may take their place."""
    if fits(logits_NV):
        loss_N = torch.empty(len(logits_NV))
        call("cross_entropy", logits_NV, targets_N, *logits_NV.shape, loss_N)
        return loss_N, logits_NV
    p, target = logits_NV.softmax(-1, dtype=torch.float32), targets_N[:, None]
    loss_N = -p.gather(1, target).clamp(min=SMALLEST).log()[:, 0]
    p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
    return loss_N, p.to(logits_NV.dtype)


def summed_cross_entropy(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Return the summed loss in nats; 0 (with a gradient of 0) when there is nothing to score."""
    if not torch.is_grad_enabled():
        rows, weight = CHUNK_ROWS, weight_VD.to(h_ND.dtype)
        parts = zip(torch.split(h_ND, rows), torch.split(targets_N, rows), strict=True)
        losses = [F.cross_entropy((h @ weight.T).float(), target, reduction="sum") for h, target in parts]
        return torch.stack(losses).sum() if len(h_ND) else h_ND.new_zeros((), dtype=torch.float32)
    return ChunkedCrossEntropy.apply(h_ND, weight_VD, targets_N)  # type: ignore[no-any-return,no-untyped-call]


def scored(segments_BT: Tensor, is_target_BT: Tensor, ahead: int) -> Tensor:
    """Return (B, T) bool: row t may predict token t+ahead, which is a target of the same document."""
    same = (segments_BT[:, :-ahead] == segments_BT[:, ahead:]) & (segments_BT[:, ahead:] >= 0)
    return F.pad(same & is_target_BT[:, ahead:], (0, ahead))


def prediction_loss(
    h_BTD: Tensor,
    weight_VD: Tensor,
    tokens_BT: Tensor,
    segments_BT: Tensor,
    is_target_BT: Tensor,
    *,
    ahead: int = 1,
) -> Tensor:
    """Return the summed loss of predicting token t+ahead from (normed) row t, over the rows that `scored` names."""
    mask = scored(segments_BT, is_target_BT, ahead)
    targets = F.pad(tokens_BT[:, ahead:], (0, ahead))[mask]
    return summed_cross_entropy(h_BTD[mask], weight_VD, targets)


def mtp_losses(
    model: Step35,
    tokens_BT: Tensor,
    h_BTD: Tensor,
    context: Context,
    segments_BT: Tensor,
    is_target_BT: Tensor,
    modules: int | None = None,
) -> list[Tensor]:
    """Return each module's summed loss from the trunk's states (before its final norm): module k predicts t+2+k."""
    states = model.mtp_states(tokens_BT, h_BTD, context, modules)
    return [
        prediction_loss(module.norm(g_BTD), module.head.weight, tokens_BT, segments_BT, is_target_BT, ahead=k + 2)
        for k, (module, g_BTD) in enumerate(zip(model.mtp, states, strict=False))
    ]


def mtp_weights(total: float, decay: float, modules: int) -> list[float]:
    """Share `total` among the modules in proportion to decay^k, so that distant tokens are not over-optimised."""
    shares = [decay**k for k in range(modules)]
    return [total * share / sum(shares) for share in shares]
