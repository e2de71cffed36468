"""One optimiser update: forward and backward over micro-batches, clip, update, move the router bias."""

# B rows  T tokens  D model  M MTP modules

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from step35.config.model import ModelConfig
from step35.config.train import TrainConfig
from step35.data.packing import Batch
from step35.errors import ConfigError
from step35.model.context import Context, Routing
from step35.model.init import clone_mtp
from step35.model.step35 import Step35
from step35.runtime.device import compute_dtype
from step35.train import loss as losses
from step35.train.balance import expert_counts, group_balance_loss, update_bias, without_padding
from step35.train.groups import apply_gradients, build_optimisers
from step35.train.master import Masters
from step35.train.monitors import experts as expert_monitor
from step35.train.schedule import balance_rate, learning_rate


@dataclass
class Tally:
    """Sums over the micro-batches of one update."""

    loss: float = 0.0
    mtp: list[float] = field(default_factory=list)
    balance: float = 0.0
    counts: dict[int, Tensor] = field(default_factory=dict)


class Learner:
    """A model and its optimisers; `update` is a pure function of their state, the batch and the step number."""

    def __init__(self, model: Step35, config: TrainConfig) -> None:
        self.model, self.config = model, config
        check_groups(model.config, config)
        device = model.embed_tokens.weight.device
        model.compute_dtype = compute_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (config.freeze_router and "router." in name))
        self.masters = Masters(model, getattr(torch, config.param_dtype))
        self.optimisers = build_optimisers(self.masters.named, model.config, config)
        self.routing: list[Routing] = []

    def update(self, batch: Batch, step: int) -> dict[str, Any]:
        """Take one step and return its metrics; raise `DivergedError` before a non-finite gradient is applied."""
        modules = self._active_mtp(step)
        tally = Tally(mtp=[0.0] * modules)
        tokens, segments, targets = (
            torch.as_tensor(x, device=self.model.embed_tokens.weight.device)
            for x in (batch.tokens, batch.segments, batch.targets)
        )
        totals = [max(1, int(losses.scored(segments, targets, ahead + 1).sum())) for ahead in range(modules + 1)]
        rows = self.config.micro_rows
        for start in range(0, len(tokens), rows):
            cut = slice(start, start + rows)
            self._accumulate(tokens[cut], segments[cut], targets[cut], totals, tally, len(tokens[cut]) / len(tokens))
        lr = learning_rate(self.config, step)
        norm = apply_gradients(
            self.optimisers, lr=lr, clip=self.config.grad_clip, loss=tally.loss, where=f"step {step}"
        )
        self.masters.publish()
        self._move_bias(tally.counts, balance_rate(self.config, step))
        health = expert_monitor.load_metrics(self.routing) if self.routing else {}
        return {
            "loss": tally.loss,
            "mtp_loss": tally.mtp,
            "lr": lr,
            "grad_norm": norm,
            "balance_loss": tally.balance,
            **health,
        }

    def _active_mtp(self, step: int) -> int:
        """Return how many MTP modules train at `step`, cloning the later ones when they join."""
        if self.config.mtp_weight == 0:
            return 0
        if step == self.config.mtp_joint_from:
            clone_mtp(self.model)
            self.masters.adopt()
        joint = self.config.mtp_joint_from is not None and step >= self.config.mtp_joint_from
        return len(self.model.mtp) if joint else min(1, len(self.model.mtp))

    def _accumulate(
        self, tokens: Tensor, segments: Tensor, targets: Tensor, totals: list[int], tally: Tally, share: float
    ) -> None:
        """Run forward and backward on one micro-batch that is `share` of the batch."""
        model, config = self.model, self.config
        context = Context.packed(tokens, segments, record=True)
        h_BTD = model.trunk(tokens, context)
        loss = losses.prediction_loss(model.norm(h_BTD), model.lm_head.weight, tokens, segments, targets) / totals[0]
        tally.loss += loss.item()
        weights = losses.mtp_weights(config.mtp_weight, config.mtp_decay, len(tally.mtp))
        for k, g_BTD in enumerate(model.mtp_states(tokens, h_BTD, context, len(tally.mtp))):
            module = model.mtp[k]
            normed = module.norm(g_BTD)
            mtp = losses.prediction_loss(normed, module.head.weight, tokens, segments, targets, ahead=k + 2)
            loss = loss + weights[k] * mtp / totals[k + 1]
            tally.mtp[k] += mtp.item() / totals[k + 1]
        self.routing = without_padding(context.routing or [], segments)
        if config.ep_weight and not config.freeze_router and self.routing:
            balance = torch.stack([group_balance_loss(r, config.ep_groups) for r in self.routing]).mean()
            loss = loss + share * config.ep_weight * balance
            tally.balance += share * balance.item()
        for r in self.routing:
            tally.counts[r.layer] = tally.counts.get(r.layer, 0) + expert_counts(r)
        loss.backward()  # type: ignore[no-untyped-call]

    def _move_bias(self, counts: dict[int, Tensor], rate: float) -> None:
        if rate == 0 or self.config.freeze_router:
            return
        for layer, counts_E in counts.items():
            update_bias(self.model.router(layer).bias, counts_E, rate)

    def panels(self) -> dict[str, Any]:
        """Return the layer x expert panels of the last micro-batch."""
        return expert_monitor.panels(self.routing, self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the step number."""
        return {
            "model": {**self.model.state_dict(), **self.masters.state_dict()},
            "optimisers": [o.state_dict() for o in self.optimisers],
            "dtype": str(self.model.compute_dtype).removeprefix("torch."),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.model.load_state_dict(state["model"])
        self.masters.load_state_dict(state["model"])
        self.model.compute_dtype = getattr(torch, state["dtype"])  # "auto" might choose otherwise today
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def check_groups(model: ModelConfig, config: TrainConfig) -> None:
    """Raise `ConfigError` when the experts cannot be split into equal groups for the balance loss."""
    experts = model.moe_num_experts
    if config.ep_weight and experts % config.ep_groups:
        divisors = [n for n in range(1, experts + 1) if experts % n == 0]
        raise ConfigError(
            f"moe_num_experts={experts} is not divisible by ep_groups={config.ep_groups}; choose from {divisors}."
        )


@torch.no_grad()
def validation_loss(model: Step35, batch: Batch, rows: int = 16) -> float:
    """Return the mean next-token loss over `batch` in nats per token."""
    device = model.embed_tokens.weight.device
    total, count = 0.0, 0
    for start in range(0, len(batch.tokens), rows):
        tokens, segments, targets = (
            torch.as_tensor(x[start : start + rows], device=device)
            for x in (batch.tokens, batch.segments, batch.targets)
        )
        h_BTD = model.norm(model.trunk(tokens, Context.packed(tokens, segments)))
        total += losses.prediction_loss(h_BTD, model.lm_head.weight, tokens, segments, targets).item()
        count += int(losses.scored(segments, targets, 1).sum())
    return total / max(1, count)
