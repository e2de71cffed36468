"""One round of learning from a set of trajectories: filter, advantages, then an epoch of actor, MTP modules, critic."""

# B responses  T tokens  M MTP modules

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from step35.config.rl import RLConfig
from step35.config.train import TrainConfig
from step35.model.step35 import Step35
from step35.post.rl.advantages import advantages, returns
from step35.post.rl.batch import TrajectoryBatch, draft_losses, state_values, token_logprobs
from step35.post.rl.critic import make_critic
from step35.post.rl.mis_po import mis_filter, mis_po_loss
from step35.runtime.device import compute_dtype, dtype_name
from step35.runtime.seeding import generator
from step35.train.groups import apply_gradients, build_optimisers
from step35.train.loss import mtp_weights


class Role:
    """Weights of a model that are trained together, their optimisers and warm-up: actor, MTP modules or critic."""

    def __init__(self, model: Step35, named: Mapping[str, Tensor], config: RLConfig, lr: float, warmup: int) -> None:
        self.model, self.config, self.lr, self.warmup = model, config, lr, warmup
        device = model.embed_tokens.weight.device
        model.compute_dtype = compute_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
        for name, parameter in named.items():
            parameter.requires_grad_("router." not in name)  # routing stays as the sampler's
        self.trained = [parameter for parameter in named.values() if parameter.requires_grad]
        settings = TrainConfig(lr=lr, final_lr=0, weight_decay=config.weight_decay)
        self.optimisers = build_optimisers(named, model.config, settings)
        self.updates = 0

    def apply(self, loss: Tensor, step: int) -> float:
        """Take one update of round `step`, of no other weights; return the gradient norm before clipping."""
        torch.autograd.backward(loss, inputs=self.trained)
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
        """Return optimisers and update count."""
        return {"optimisers": [o.state_dict() for o in self.optimisers], "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.updates = state["updates"]


class RLLearner:
    """Actor, its MTP modules and critic. `update` is a pure function of their state, the trajectories and the round."""

    def __init__(self, actor: Step35, config: RLConfig) -> None:
        self.config = config
        critic = make_critic(actor)
        modules = {name: weights for name, weights in actor.named_parameters() if name.startswith("mtp.")}
        trunk = {name: weights for name, weights in actor.named_parameters() if name not in modules}
        self.actor = Role(actor, trunk, config, config.actor_lr, config.actor_warmup)
        self.drafter: Role | None = None
        if modules and config.mtp_lr:
            self.drafter = Role(actor, modules, config, config.mtp_lr, config.actor_warmup)
        self.critic = Role(critic, dict(critic.named_parameters()), config, config.critic_lr, config.critic_warmup)

    def update(self, batch: TrajectoryBatch, step: int) -> dict[str, Any]:
        """Learn from one round; return its diagnostics."""
        batch = batch.to(self.actor.model.embed_tokens.weight.device)
        with torch.no_grad():
            old_BT, entropy_BT = token_logprobs(self.actor.model, batch)
            values_BT, final_B = state_values(self.critic.model, batch)
        passed = mis_filter(old_BT, batch.infer_BT, batch.mask_BT, self.config.mis_po)
        returns_B = returns(batch.rewards_B, batch.truncated_B, final_B)
        advantages_BT = advantages(returns_B, values_BT, batch.mask_BT, self.config.negative_weight)
        actor = self._train_actor(batch, advantages_BT, passed.kept_BT, step)
        drafter = {"mtp_loss": self._train_drafter(self.drafter, batch, step)} if self.drafter else {}
        critic = self._train_critic(batch, returns_B, step)
        entropy = float(entropy_BT.sum() / batch.mask_BT.sum().clamp(min=1))
        return {
            "lr": self.actor.learning_rate(step),
            "critic_lr": self.critic.learning_rate(step),
            **passed.diagnostics,
            **actor,
            **drafter,
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

    def _train_drafter(self, drafter: Role, batch: TrajectoryBatch, step: int) -> list[float]:
        weights = mtp_weights(1.0, self.config.mtp_decay, len(drafter.model.mtp))
        found = []
        parts = self._minibatches(len(batch.rewards_B), self.config.actor_batches, "mtp", step)
        for rows in parts[: self.config.mtp_batches]:
            loss_M = torch.stack(draft_losses(drafter.model, batch.rows(rows)))
            drafter.apply(loss_M @ loss_M.new_tensor(weights), step)
            found.append(loss_M.tolist())
        return [_mean(depth) for depth in zip(*found, strict=True)]

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
        """Return both models, and the state of every role's optimisers."""
        drafter = {"drafter": self.drafter.state_dict()} if self.drafter else {}
        return {"actor": _whole(self.actor), **drafter, "critic": _whole(self.critic)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        for role, saved in ((self.actor, state["actor"]), (self.critic, state["critic"])):
            role.model.load_state_dict(saved["model"])
            role.model.compute_dtype = getattr(torch, saved["dtype"])  # "auto" might choose otherwise today
            role.load_state_dict(saved)
        if self.drafter:
            self.drafter.load_state_dict(state["drafter"])


def _whole(role: Role) -> dict[str, Any]:
    """Return a role's state with its model's weights and compute dtype."""
    return {"model": role.model.state_dict(), "dtype": dtype_name(role.model.compute_dtype), **role.state_dict()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
