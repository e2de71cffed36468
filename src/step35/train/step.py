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
from step35.model.context import Context
from step35.model.init import clone_mtp
from step35.model.step35 import Step35
from step35.runtime.device import compute_dtype, dtype_name
from step35.train import loss as losses
from step35.train.balance import expert_counts, group_balance_loss, update_bias, without_padding
from step35.train.groups import build_optimisers, diverged, drop_gradients, step_optimisers
from step35.train.master import Masters
from step35.train.monitors.matrices import norms
from step35.train.monitors.monitor import Monitor
from step35.train.muon import Muon
from step35.train.schedule import balance_rate, learning_rate


@dataclass
class Tally:
    """Sums over the micro-batches of one update."""

    loss: float = 0.0
    mtp: list[float] = field(default_factory=list)
    balance: float = 0.0
    norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Norm of the accumulated gradient."""
    counts: dict[int, Tensor] = field(default_factory=dict)


class Learner:
    """A model and its optimisers; `update` is a pure function of their state, the batch and the step number."""

    def __init__(self, model: Step35, config: TrainConfig) -> None:
        self.model, self.config = model, config
        check_fit(model.config, config)
        device = model.embed_tokens.weight.device
        model.compute_dtype = compute_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (config.freeze_router and "router." in name))
        self.masters = Masters(model, getattr(torch, config.param_dtype))
        self.optimisers = build_optimisers(self.masters.named, model.config, config)
        names = {id(parameter): name for name, parameter in self.masters.named.items()}
        self.trained = {names[id(p)]: p for o in self.optimisers for group in o.param_groups for p in group["params"]}
        """The weights that the optimisers update, in their order."""
        muon = next((o for o in self.optimisers if isinstance(o, Muon)), None)
        self.monitor = Monitor(model, config, self.trained, muon)
        self.tally = Tally()

    def update(self, batch: Batch, step: int) -> dict[str, Any]:
        """Take one step and return its metrics; raise `DivergedError` before a non-finite gradient is applied."""
        metrics = self.accumulate(batch, step)
        if metrics["non_finite"]:
            self.drop()
            raise diverged(metrics["loss"], metrics["grad_norm"], f"step {step}")
        return metrics | self.apply(step)

    def accumulate(self, batch: Batch, step: int) -> dict[str, Any]:
        """Run forward and backward over the batch; return its metrics. `apply` or `drop` must follow."""
        modules = self._active_mtp(step)
        self.tally = tally = Tally(mtp=[0.0] * modules)
        self.monitor.start()
        tokens, segments, targets = (
            torch.as_tensor(x, device=self.model.embed_tokens.weight.device)
            for x in (batch.tokens, batch.segments, batch.targets)
        )
        totals = [max(1, int(losses.scored(segments, targets, ahead + 1).sum())) for ahead in range(modules + 1)]
        rows = self.config.micro_rows
        for start in range(0, len(tokens), rows):
            cut = slice(start, start + rows)
            self._accumulate(tokens[cut], segments[cut], targets[cut], totals, tally, len(tokens[cut]) / len(tokens))
        tally.norm, by_name = norms({name: p.grad for name, p in self.trained.items() if p.grad is not None})
        health = self.monitor.before_update(tally.loss, tally.norm.item(), by_name)
        return {"loss": tally.loss, "mtp_loss": tally.mtp, "balance_loss": tally.balance, **health}

    def apply(self, step: int) -> dict[str, Any]:
        """Clip and apply what was accumulated, and move the router's bias; return what is measured of the update."""
        lr = learning_rate(self.config, step)
        sample = self.monitor.sample()
        torch.nn.utils.clip_grads_with_norm_(self.trained.values(), self.config.grad_clip, self.tally.norm)
        step_optimisers(self.optimisers, lr)
        self.masters.publish()
        self._move_bias(self.tally.counts, balance_rate(self.config, step))
        return {"lr": lr, **self.monitor.after_update(sample, lr)}

    def drop(self) -> None:
        """Forget what was accumulated: parameters, optimisers and router bias stay as they are."""
        drop_gradients(self.optimisers)

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
        context = Context.packed(tokens, segments, record=True, observer=self.monitor.observe(segments))
        h_BTD = model.trunk(tokens, context)
        loss = losses.prediction_loss(model.norm(h_BTD), model.lm_head.weight, tokens, segments, targets) / totals[0]
        main_loss = loss.item()
        tally.loss += main_loss
        weights = losses.mtp_weights(config.mtp_weight, config.mtp_decay, len(tally.mtp))
        drafts = losses.mtp_losses(model, tokens, h_BTD, context, segments, targets, len(tally.mtp))
        for k, mtp in enumerate(drafts):
            loss = loss + weights[k] * mtp / totals[k + 1]
            tally.mtp[k] += mtp.item() / totals[k + 1]
        routing = without_padding(context.routing or [], segments)
        self.monitor.micro_batch(main_loss, routing)
        if config.ep_weight and not config.freeze_router and routing:
            balance = torch.stack([group_balance_loss(r, config.ep_groups) for r in routing]).mean()
            loss = loss + share * config.ep_weight * balance
            tally.balance += share * balance.item()
        for r in routing:
            tally.counts[r.layer] = tally.counts.get(r.layer, 0) + expert_counts(r)
        loss.backward()  # type: ignore[no-untyped-call]

    def _move_bias(self, counts: dict[int, Tensor], rate: float) -> None:
        if rate == 0 or self.config.freeze_router:
            return
        for layer, counts_E in counts.items():
            update_bias(self.model.router(layer).bias, counts_E, rate)

    def details(self) -> dict[str, Any]:
        """Return the layer x expert panels of the last step, and its figures by matrix class."""
        return self.monitor.details()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the step number."""
        return {
            "model": {**self.model.state_dict(), **self.masters.state_dict()},
            "optimisers": [o.state_dict() for o in self.optimisers],
            "monitor": self.monitor.state_dict(),
            "dtype": dtype_name(self.model.compute_dtype),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; one without monitors starts them anew."""
        self.model.load_state_dict(state["model"])
        self.masters.load_state_dict(state["model"])
        if self.config.dtype == "auto":  # which might choose otherwise today
            self.model.compute_dtype = getattr(torch, state["dtype"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            _load_moments(optimiser, saved)
        if "monitor" in state:
            self.monitor.load_state_dict(state["monitor"])


def _load_moments(optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take up saved moments, but keep the optimiser's own settings: a later stage may have others."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimiser.param_groups]
    optimiser.load_state_dict(saved)
    for group, own in zip(optimiser.param_groups, settings, strict=True):
        group.update(own)


def check_fit(model: ModelConfig, config: TrainConfig) -> None:
    """Raise `ConfigError` for settings that this model cannot be trained with."""
    if config.context > model.max_position_embeddings:
        raise ConfigError(
            f"context={config.context} is beyond the model's max_position_embeddings={model.max_position_embeddings}, "
            "at which engines end a text; choose a context up to that, or start from a checkpoint with more in its "
            "config.json."
        )
    joint = config.mtp_joint_from
    if joint is not None and not model.num_nextn_predict_layers:
        raise ConfigError(f"mtp_joint_from={joint}, but the model has no MTP modules; leave it out, or give it some.")
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
