from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from step35.api.trajectory import Trajectory
from step35.config.rl import MISPOConfig, RLConfig
from step35.errors import DivergedError
from step35.model.step35 import Step35
from step35.post.rl.batch import TrajectoryBatch, state_values, token_logprobs
from step35.post.rl.learner import RLLearner

MakeModel = Callable[..., Step35]
PROMPT = [5, 2]
WIDE = MISPOConfig(token_low=1e-9, token_high=1e9, trajectory_low=1e-9, trajectory_high=1e9)


def settings(**changes: Any) -> RLConfig:
    values = {
        "actor_batches": 2,
        "mtp_batches": 2,
        "critic_batches": 2,
        "actor_warmup": 1,
        "critic_warmup": 1,
        "actor_lr": 3e-3,
    }
    return RLConfig(**{**values, "critic_lr": 3e-3, "weight_decay": 0.0, **changes})


@torch.no_grad()
def next_logprobs(model: Step35) -> Tensor:
    return model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)


def play_bandit(model: Step35, count: int, seed: int, good: int) -> TrajectoryBatch:
    """One token each, sampled from the policy; the token `good` is worth 1."""
    log_p = next_logprobs(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(log_p.exp(), count, replacement=True, generator=generator).tolist()
    played = [
        Trajectory(
            [*PROMPT, token], [False, False, True], [0.0, 0.0, log_p[token].item()], [-1, -1, 0], float(token == good)
        )
        for token in drawn
    ]
    return TrajectoryBatch.of(played, pad_id=1)


def long_batch(
    model: Step35, lengths: Sequence[int] = (12, 7, 10, 9), truncated: Collection[int] = ()
) -> TrajectoryBatch:
    """Random responses whose log-probabilities are the model's own; every other one is worth 1."""
    generator = torch.Generator().manual_seed(0)
    played = []
    for b, length in enumerate(lengths):
        tokens = torch.randint(97, (length,), generator=generator).tolist()
        mask = [t >= 3 for t in range(length)]
        reward = 0.0 if b in truncated else float(b % 2)
        played.append(Trajectory(tokens, mask, [0.0] * length, [0] * length, reward, b in truncated))
    batch = TrajectoryBatch.of(played, pad_id=1)
    with torch.no_grad():
        batch.infer_BT.copy_(token_logprobs(model, batch)[0])
    return batch


def test_the_actor_learns_which_arm_pays(make_model: MakeModel) -> None:
    model = make_model(vocab_size=8)
    learner = RLLearner(model, settings())
    before = next_logprobs(model).exp()
    assert before[4] < 0.3
    for step in range(12):
        metrics = learner.update(play_bandit(model, 32, seed=step, good=4), step)
        assert metrics["accept_trajectories"] == 1  # on-policy: nothing is filtered
    assert next_logprobs(model).exp()[4] > 0.9


def test_the_critic_learns_what_a_state_is_worth(make_model: MakeModel) -> None:
    model = make_model()
    learner = RLLearner(model, settings(actor_lr=1e-12, critic_batches=1))
    batch = long_batch(model)
    losses = [learner.update(batch, step)["value_loss"] for step in range(25)]
    rewards = batch.rewards_B[:, None].expand_as(batch.mask_BT)[batch.mask_BT]
    assert losses[0] == pytest.approx(rewards.square().mean().item())  # all values start at 0
    assert losses[-1] < 0.02


def test_a_truncated_response_returns_the_critics_value_of_its_end(make_model: MakeModel) -> None:
    model = make_model()
    learner = RLLearner(model, settings(actor_batches=1, critic_batches=1))
    critic = learner.critic.model
    with torch.no_grad():
        critic.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
        batch = long_batch(model, truncated=[1])
        values, final = state_values(critic, batch)
        logprobs, _ = token_logprobs(model, batch)
    goals = batch.rewards_B.clone()
    goals[1] = final[1]
    assert final[1].abs() > 0.1
    advantages = (goals[:, None] - values)[batch.mask_BT]
    metrics = learner.update(batch, 0)
    assert metrics["value_loss"] == pytest.approx(advantages.square().mean().item(), rel=1e-4)
    assert metrics["policy_loss"] == pytest.approx(-(logprobs[batch.mask_BT] * advantages).mean().item(), rel=1e-4)
    assert metrics["value_mean"] == pytest.approx(values[batch.mask_BT].mean().item(), rel=1e-4)


def actor_after(model: Step35, batch: TrajectoryBatch, **changes: Any) -> dict[str, Tensor]:
    RLLearner(model, settings(actor_batches=1, **changes)).update(batch, 0)
    return model.state_dict()


def test_a_filtered_response_leaves_no_trace_in_the_actor(make_model: MakeModel) -> None:
    actors, losses = [], []
    for reward in (0.0, 5.0):
        model = make_model()
        batch = long_batch(model)
        batch.infer_BT[0] -= 0.5 * batch.mask_BT[0]  # out of the trajectory band
        batch.rewards_B[0] = reward
        losses.append(RLLearner(model, settings(actor_batches=1)).update(batch, 0)["policy_loss"])
        actors.append(model.state_dict())
    assert not torch.equal(actors[0]["lm_head.weight"], make_model().lm_head.weight)
    for name, tensor in actors[0].items():
        assert torch.equal(tensor, actors[1][name]), name
    # Nor does it count below the line: all values start at 0, so advantages are the rewards 1, 0, 1.
    kept = batch.mask_BT[1:]
    taught = (batch.infer_BT * batch.rewards_B[:, None])[1:]
    assert losses == pytest.approx([-taught[kept].mean().item()] * 2, rel=1e-4)


def test_nothing_accepted_moves_nothing(make_model: MakeModel) -> None:
    # After a round that was accepted, so that there is momentum; and with weight decay.
    model = make_model()
    learner = RLLearner(model, settings(weight_decay=0.1))
    assert learner.update(long_batch(model), 0)["skipped_updates"] == 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = long_batch(model)
    batch.infer_BT.sub_(0.5 * batch.mask_BT)
    metrics = learner.update(batch, 1)
    assert metrics["accept_both"] == 0
    assert metrics["skipped_updates"] == learner.config.actor_batches
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor) or name.startswith("mtp."), name


@pytest.mark.parametrize(("ratio_at", "accepted"), [("snapshot", 1.0), ("update", 0.5)])
def test_the_ratio_is_taken_before_the_epoch_or_at_each_update(
    make_model: MakeModel, ratio_at: str, accepted: float
) -> None:
    # The first of two mini-batches moves the policy far away, so that only a ratio taken afresh rejects the second.
    model = make_model()
    learner = RLLearner(model, settings(actor_lr=0.3, mis_po=MISPOConfig(ratio_at=ratio_at)))
    metrics = learner.update(long_batch(model, lengths=[9] * 4), 0)
    assert metrics["accept_tokens"] == metrics["accept_trajectories"] == 1.0
    assert metrics["accept_both"] == pytest.approx(accepted)


def test_routers_stay(make_model: MakeModel) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    after = actor_after(model, long_batch(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert not {name for name in moved if "router" in name}
    assert {"layers.1.moe.experts.down_proj", "embed_tokens.weight", "mtp.0.head.weight"} <= moved


def test_mtp_modules_learn_to_draft_what_the_policy_said(make_model: MakeModel) -> None:
    model = make_model(mtp=3)
    learner = RLLearner(model, settings(actor_lr=1e-12, mtp_lr=1e-2))
    batch = long_batch(model)
    losses = [learner.update(batch, step)["mtp_loss"] for step in range(15)]
    assert [len(depths) for depths in losses] == [3] * 15
    assert min(losses[0]) > 3
    assert max(losses[-1]) < 0.5
    with torch.no_grad():
        drafts = model(batch.tokens_BT, mtp=True, segments_BT=batch.segments_BT).mtp_logits
    for k, logits_BTV in enumerate(drafts):
        said = batch.mask_BT[:, k + 2 :]
        drafted = logits_BTV[:, : -(k + 2)].argmax(-1)[said]
        assert (drafted == batch.tokens_BT[:, k + 2 :][said]).float().mean() > 0.95


def test_mtp_modules_leave_no_trace_in_the_trunk(make_model: MakeModel) -> None:
    trunks, modules = [], []
    for mtp_lr in (0.0, 1e-2):
        model = make_model(mtp=3)
        learner = RLLearner(model, settings(mtp_lr=mtp_lr, weight_decay=0.1))
        batch = long_batch(model)
        metrics = [learner.update(batch, step) for step in range(3)]
        assert all(("mtp_loss" in found) == (mtp_lr > 0) for found in metrics)
        state = model.state_dict()
        modules.append({name: tensor for name, tensor in state.items() if name.startswith("mtp.")})
        trunks.append({name: tensor for name, tensor in state.items() if name not in modules[-1]})
    for name, tensor in trunks[0].items():
        assert torch.equal(tensor, trunks[1][name]), name
    untouched = make_model(mtp=3).state_dict()
    for name, tensor in modules[0].items():
        assert torch.equal(tensor, untouched[name]), name
        assert not torch.equal(tensor, modules[1][name]), name


def test_a_model_without_mtp_modules_learns_too(make_model: MakeModel) -> None:
    model = make_model(mtp=0)
    assert "mtp_loss" not in RLLearner(model, settings()).update(long_batch(model), 0)


def test_a_resumed_learner_continues_bit_for_bit(make_model: MakeModel) -> None:
    config = settings(actor_warmup=4, critic_warmup=6, weight_decay=0.1, mis_po=WIDE)
    batch = long_batch(make_model())
    unbroken = RLLearner(make_model(), config)
    resumed = RLLearner(make_model(seed=9), config)  # other weights: all must come from the state
    first = unbroken.update(batch, 0)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    second = unbroken.update(batch, 1)
    assert second != first
    assert resumed.update(batch, 1) == second
    for role in ("actor", "drafter", "critic"):
        ours, theirs = getattr(resumed, role), getattr(unbroken, role)
        assert ours.updates == theirs.updates == 4
        for name, tensor in theirs.model.state_dict().items():
            assert torch.equal(ours.model.state_dict()[name], tensor), name


def test_the_rate_rises_over_the_warm_up_and_falls_over_the_rounds(make_model: MakeModel) -> None:
    learner = RLLearner(
        make_model(),
        settings(actor_warmup=4, actor_lr=0.4, actor_batches=1, critic_batches=1, steps=10, final_lr_share=0.5),
    )
    rates = []
    for step in range(5):
        learner.update(long_batch(learner.actor.model), step)
        rates.append([group["lr"] for optimiser in learner.actor.optimisers for group in optimiser.param_groups])
    assert [rate[0] for rate in rates] == pytest.approx([0.1, 0.2 * 0.95, 0.3 * 0.9, 0.4 * 0.85, 0.4 * 0.8])
    assert all(len(set(rate)) == 1 for rate in rates)


def test_a_gradient_that_is_not_finite_stops_before_anything_changes(make_model: MakeModel) -> None:
    model = make_model()
    batch = long_batch(model)
    batch.rewards_B[1] = math.nan
    with pytest.raises(DivergedError, match=r"round 0, update 1: .*not applied"):
        actor_after(model, batch)
    for name, tensor in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_resumed_learner_keeps_its_compute_dtype(make_model: MakeModel) -> None:
    saved = RLLearner(make_model(), settings(dtype="bfloat16")).state_dict()
    resumed = RLLearner(make_model(), settings(dtype="float32"))
    resumed.load_state_dict(saved)
    assert resumed.actor.model.compute_dtype == resumed.critic.model.compute_dtype == torch.bfloat16
