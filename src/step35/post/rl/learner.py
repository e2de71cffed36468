"""One round of learning from a set of trajectories: filter, advantages, actor epoch, critic epoch."""

# B responses  T tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from step35.config.rl import RLConfig
from step35.config.train import TrainConfig
from step35.model.step35 import Step35
from step35.post.rl.advantages import advantages, returns
from step35.post.rl.batch import TrajectoryBatch, state_values, token_logprobs
from step35.post.rl.critic import make_critic
from step35.post.rl.mis_po import mis_filter, mis_po_loss
from step35.runtime.device import compute_dtype
from step35.runtime.seeding import generator
from step35.train.groups import apply_gradients, build_optimisers


class Role:
    """A model, its optimisers and its warm-up: the actor or the critic."""

    def __init__(self, model: Step35, config: RLConfig, lr: float, warmup: int) -> None:
        self.model, self.config, self.lr, self.warmup = model, config, lr, warmup
        device = model.embed_tokens.weight.device
        model.compute_dtype = compute_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("router." not in name)  # routing stays as the sampler's
        settings = TrainConfig(lr=lr, final_lr=0, weight_decay=config.weight_decay)
        self.optimisers = build_optimisers(dict(model.named_parameters()), model.config, settings)
        self.updates = 0

    def apply(self, loss: Tensor, step: int) -> float:
        """Take one update of round `step`; return the gradient norm before clipping."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.updates += 1
        return apply_gradients(
            self.optimisers,
            lr=self.learning_rate(step),
            clip=self.config.grad_clip,
            loss=loss.item(),
            where=f"round {step}, update {self.updates}",
        )

    def learning_rate(self, step: int) -> float:
        """Return the rate of the current update: warm-up by updates, then a linear fall by rounds."""
        fall = 1 - (1 - self.config.final_lr_share) * step / self.config.steps
        return self.lr * fall * min(1.0, self.updates / max(1, self.warmup))

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimisers, update count and compute dtype."""
        optimisers = [o.state_dict() for o in self.optimisers]
        return {
            "model": self.model.state_dict(),
            "optimisers": optimisers,
            "updates": self.updates,
            "dtype": str(self.model.compute_dtype).removeprefix("torch."),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.updates = state["updates"]
        self.model.compute_dtype = getattr(torch, state["dtype"])  # "auto" might choose otherwise today


class RLLearner:
    """Actor and critic. `update` is a pure function of their state, the trajectories and the round number."""

    def __init__(self, actor: Step35, config: RLConfig) -> None:
        self.config = config
        self.actor = Role(actor, config, config.actor_lr, config.actor_warmup)
        self.critic = Role(make_critic(actor), config, config.critic_lr, config.critic_warmup)

    def update(self, batch: TrajectoryBatch, step: int) -> dict[str, float]:
        """Learn from one round; return its diagnostics."""
        batch = batch.to(self.actor.model.embed_tokens.weight.device)
        with torch.no_grad():
            old_BT, entropy_BT = token_logprobs(self.actor.model, batch)
            values_BT, final_B = state_values(self.critic.model, batch)
        passed = mis_filter(old_BT, batch.infer_BT, batch.mask_BT, self.config.mis_po)
        returns_B = returns(batch.rewards_B, batch.truncated_B, final_B)
        advantages_BT = advantages(returns_B, values_BT, batch.mask_BT, self.config.negative_weight)
        actor = self._train_actor(batch, advantages_BT, passed.kept_BT, step)
        critic = self._train_critic(batch, returns_B, step)
        entropy = float(entropy_BT.sum() / batch.mask_BT.sum().clamp(min=1))
        return {
            "lr": self.actor.learning_rate(step),
            "critic_lr": self.critic.learning_rate(step),
            **passed.diagnostics,
            **actor,
            **critic,
            "entropy": entropy,
            "value_mean": float(values_BT[batch.mask_BT].mean()),
        }

    def _train_actor(
        self, batch: TrajectoryBatch, advantages_BT: Tensor, kept_BT: Tensor, step: int
    ) -> dict[str, float]:
        norms, losses, accepted, skipped = [], [], [], 0
        for rows in self._minibatches(len(batch.rewards_B), self.config.actor_batches, "actor", step):
            part = batch.rows(rows)
            width = part.tokens_BT.shape[1]
            logprobs_BT, _ = token_logprobs(self.actor.model, part)
            kept = kept_BT[rows, :width]
            if self.config.mis_po.ratio_at == "update":
                kept = mis_filter(logprobs_BT.detach(), part.infer_BT, part.mask_BT, self.config.mis_po).kept_BT
            accepted.append(float(kept.sum() / part.mask_BT.sum().clamp(min=1)))
            if not kept.any():  # no gradient, but momentum and decay would still move the weights
                skipped += 1
                continue
            loss = mis_po_loss(logprobs_BT, advantages_BT[rows, :width], kept)
            norms.append(self.actor.apply(loss, step))
            losses.append(loss.item())
        return {
            "grad_norm": _mean(norms),
            "policy_loss": _mean(losses),
            "accept_both": _mean(accepted),
            "skipped_updates": skipped,
        }

    def _train_critic(self, batch: TrajectoryBatch, returns_B: Tensor, step: int) -> dict[str, float]:
        norms, losses = [], []
        for rows in self._minibatches(len(batch.rewards_B), self.config.critic_batches, "critic", step):
            part = batch.rows(rows)
            values_BT, _ = state_values(self.critic.model, part)
            error = torch.where(part.mask_BT, values_BT - returns_B[rows, None], torch.zeros_like(values_BT))
            loss = error.square().sum() / part.mask_BT.sum().clamp(min=1)
            norms.append(self.critic.apply(loss, step))
            losses.append(loss.item())
        return {"value_loss": _mean(losses), "critic_grad_norm": _mean(norms)}

    def _minibatches(self, count: int, batches: int, role: str, step: int) -> Sequence[Tensor]:
        order = torch.randperm(count, generator=generator(self.config.seed, "rl", role, step))
        return [part for part in order.tensor_split(batches) if len(part)]

    def state_dict(self) -> dict[str, Any]:
        """Return both roles' states."""
        return {"actor": self.actor.state_dict(), "critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
