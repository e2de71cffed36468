from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from step35.config.train import MuonConfig, TrainConfig
from step35.data.packing import Batch
from step35.errors import ConfigError, DivergedError
from step35.model.step35 import Step35
from step35.train.balance import update_bias
from step35.train.step import Learner, validation_loss

MakeModel = Callable[..., Step35]
MakeBatch = Callable[..., Batch]


def settings(**changes: Any) -> TrainConfig:
    values = {
        "steps": 100, "batch_rows": 4, "micro_rows": 4, "context": 24, "warmup_steps": 1, "lr": 0.02, "final_lr": 0.02,
        "dtype": "float32", "optim": MuonConfig(iteration_dtype="float32"),
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def snapshot(model: Step35) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: Step35, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_a_batch_is_learned_by_heart_by_trunk_and_modules(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model, batch = make_model(), make_batch(rows=2, tokens=16)
    learner = Learner(model, settings(mtp_joint_from=0, weight_decay=0.0, mtp_weight=1.0))
    first = learner.update(batch, 0)
    assert first["loss"] > 3
    assert min(first["mtp_loss"]) > 3
    for step in range(1, 60):
        last = learner.update(batch, step)
    assert last["loss"] < 0.1
    assert len(last["mtp_loss"]) == 2
    assert max(last["mtp_loss"]) < 0.1
    assert validation_loss(model, batch) == pytest.approx(last["loss"], abs=0.05)


def test_the_reported_losses_are_means_over_scored_tokens(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model, batch = make_model(), make_batch()
    tokens, segments = torch.as_tensor(batch.tokens), torch.as_tensor(batch.segments)
    with torch.no_grad():
        output = model(tokens, mtp=True, segments_BT=segments)
    expected = []
    for ahead, logits in enumerate([output.logits, *output.mtp_logits], start=1):
        log_p = logits.log_softmax(-1)
        scores = [
            -log_p[b, t, tokens[b, t + ahead]].item()
            for b in range(4)
            for t in range(24 - ahead)
            if segments[b, t] == segments[b, t + ahead] and batch.targets[b, t + ahead]
        ]
        expected.append(sum(scores) / len(scores))
    assert validation_loss(model, batch, rows=3) == pytest.approx(expected[0], rel=1e-5)
    metrics = Learner(model, settings(mtp_joint_from=None)).update(batch, 0)
    assert [metrics["loss"], *metrics["mtp_loss"]] == pytest.approx(expected[:2], rel=1e-5)


def gradients_of_one_update(
    model: Step35, config: TrainConfig, batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the gradients that the optimisers were given, and the metrics."""
    learner = Learner(model, config)
    seen: dict[str, Tensor] = {}

    def look(*unused: object) -> None:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    learner.optimisers[0].register_step_pre_hook(look)
    return seen, learner.update(batch, 0)


@pytest.mark.parametrize("micro_rows", [1, 2])
def test_micro_batches_equal_one_batch(make_model: MakeModel, make_batch: MakeBatch, micro_rows: int) -> None:
    # The rows have unequal numbers of targets, so averaging per micro-batch would show.
    batch = make_batch()
    assert len(set(batch.targets.sum(1).tolist())) > 1
    results = []
    for rows in (4, micro_rows):
        model = make_model()
        config = settings(micro_rows=rows, ep_weight=0.0, grad_clip=1e9, mtp_joint_from=0)
        results.append((*gradients_of_one_update(model, config, batch), model))
    (whole, whole_metrics, whole_model), (split, split_metrics, split_model) = results
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        assert (split[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert split_metrics["loss"] == pytest.approx(whole_metrics["loss"], rel=1e-5)
    assert split_metrics["mtp_loss"] == pytest.approx(whole_metrics["mtp_loss"], rel=1e-5)
    assert split_metrics["grad_norm"] == pytest.approx(whole_metrics["grad_norm"], rel=1e-4)
    for layer in (1, 2, 3, 4):
        assert torch.equal(split_model.router(layer).bias, whole_model.router(layer).bias)


def test_the_balance_loss_is_a_mean_over_micro_batches(make_model: MakeModel, make_batch: MakeBatch) -> None:
    # Of two equal rows each is as unbalanced as both together. (Rows that differ are balanced pass by pass.)
    one = make_batch(rows=1)
    batch = Batch(*(np.concatenate([x, x]) for x in (one.tokens, one.segments, one.targets)))
    results = []
    for rows in (1, 2):
        config = settings(batch_rows=2, micro_rows=rows, ep_weight=10.0, grad_clip=1e9)
        seen, metrics = gradients_of_one_update(make_model(), config, batch)
        results.append((metrics["balance_loss"], seen["layers.3.moe.router.weight"]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_the_schedules_rate_is_the_one_applied(make_model: MakeModel, make_batch: MakeBatch) -> None:
    learner = Learner(make_model(), settings(warmup_steps=4))
    for step in range(3):
        assert learner.update(make_batch(), step)["lr"] == pytest.approx(0.005 * (step + 1))
        rates = {group["lr"] for optimiser in learner.optimisers for group in optimiser.param_groups}
        assert list(rates) == pytest.approx([0.005 * (step + 1)])


def test_the_gradient_is_that_of_the_weighted_losses(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch()
    config = settings(ep_weight=0.0, grad_clip=1e9, mtp_joint_from=0, mtp_weight=0.5, mtp_decay=0.25)
    model = make_model()
    ours, _ = gradients_of_one_update(model, config, batch)
    model = make_model()
    model.mtp[1].load_state_dict(model.mtp[0].state_dict())
    tokens, segments, targets = (torch.as_tensor(x) for x in (batch.tokens, batch.segments, batch.targets))
    output = model(tokens, mtp=True, segments_BT=segments)
    total = torch.zeros(())
    for weight, ahead, logits in zip((1.0, 0.4, 0.1), (1, 2, 3), [output.logits, *output.mtp_logits], strict=True):
        mask = (segments[:, :-ahead] == segments[:, ahead:]) & (segments[:, ahead:] >= 0) & targets[:, ahead:]
        total = total + weight * torch.nn.functional.cross_entropy(logits[:, :-ahead][mask], tokens[:, ahead:][mask])
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


def test_gradients_are_clipped_to_their_joint_norm(make_model: MakeModel, make_batch: MakeBatch) -> None:
    seen, metrics = gradients_of_one_update(make_model(), settings(grad_clip=0.01), make_batch())
    assert metrics["grad_norm"] > 0.1
    assert math.sqrt(sum(g.square().sum().item() for g in seen.values())) == pytest.approx(0.01, rel=1e-3)


def test_every_part_that_trains_moves_and_the_bias_follows_the_load(
    make_model: MakeModel, make_batch: MakeBatch
) -> None:
    model, batch = make_model(), make_batch()
    before = snapshot(model)
    learner = Learner(model, settings(balance_rate=0.01))
    learner.update(batch, 0)
    assert all(parameter.grad is None for parameter in model.parameters())  # the next update starts from none
    second = {name for name in before if name.startswith("mtp.1.")}  # not before mtp_joint_from
    assert changed(model, before) == before.keys() - second
    for layer, counts in learner.tally.counts.items():
        assert counts.sum() == 2 * (batch.segments >= 0).sum()
        expected = before[f"layers.{layer}.moe.router.bias"].clone()
        update_bias(expected, counts, 0.01)
        assert torch.equal(model.router(layer).bias, expected)


def test_a_frozen_router_stays(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model()
    before = snapshot(model)
    learner = Learner(model, settings(freeze_router=True, balance_rate=0.01, ep_weight=0.1))
    for step in range(2):
        metrics = learner.update(make_batch(), step)
    moved = changed(model, before)
    assert not [name for name in moved if "router" in name]
    assert "layers.1.moe.experts.gate_up_proj" in moved
    assert metrics["balance_loss"] == 0


def test_the_balance_loss_trains_the_router(make_model: MakeModel, make_batch: MakeBatch) -> None:
    routers = []
    for weight in (0.0, 10.0):
        model = make_model()
        learner = Learner(model, settings(ep_weight=weight, grad_clip=1e9))
        metrics = learner.update(make_batch(), 0)
        routers.append(model.router(2).weight.detach().clone())
    assert metrics["balance_loss"] > 0.9
    assert not torch.equal(*routers)


@pytest.mark.parametrize("broken", ["lm_head.weight", "mtp.0.head.weight", "layers.2.attention.o_proj.weight"])
def test_a_loss_that_is_not_finite_stops_before_anything_changes(
    make_model: MakeModel, make_batch: MakeBatch, broken: str
) -> None:
    model = make_model()
    learner = Learner(model, settings(balance_rate=0.01))
    learner.update(make_batch(seed=1), 0)
    with torch.no_grad():
        model.get_parameter(broken)[0, 0] = math.nan
    before = snapshot(model)
    momenta = [{k: v.clone() for k, v in s.items()} for s in learner.optimisers[0].state.values()]
    with pytest.raises(DivergedError, match=r"step 1: .*not applied"):
        learner.update(make_batch(), 1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(9e9), before[name].nan_to_num(9e9)), name
    assert all(parameter.grad is None for parameter in model.parameters())
    for now, then in zip(learner.optimisers[0].state.values(), momenta, strict=True):
        assert torch.equal(now["momentum"], then["momentum"])


def test_later_modules_join_as_clones_and_then_train_on_their_own(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model()
    second = snapshot(model.mtp[1])
    # A rate of nearly 0 shows the clone itself.
    still = Learner(model, settings(mtp_joint_from=1, lr=1e-30, final_lr=0.0, weight_decay=0.0))
    assert len(still.update(make_batch(), 0)["mtp_loss"]) == 1
    assert not changed(model.mtp[1], second)
    assert len(still.update(make_batch(), 1)["mtp_loss"]) == 2
    assert not changed(model.mtp[1], snapshot(model.mtp[0]))
    # Afterwards every module goes its own way, and is not cloned again.
    moving = Learner(model, settings(mtp_joint_from=1))
    for step in (2, 3):
        first, second = snapshot(model.mtp[0]), snapshot(model.mtp[1])
        moving.update(make_batch(), step)
        assert changed(model.mtp[0], first) == first.keys()
        assert changed(model.mtp[1], second) == second.keys()
    second = snapshot(model.mtp[1])
    assert "head.weight" in changed(model.mtp[0], second)
    still.update(make_batch(), 4)
    assert not changed(model.mtp[1], second)


def test_no_mtp_weight_trains_no_module(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model()
    before = snapshot(model)
    assert Learner(model, settings(mtp_weight=0.0)).update(make_batch(), 0)["mtp_loss"] == []
    assert not [name for name in changed(model, before) if name.startswith("mtp.")]


def test_a_batch_without_targets_is_survived(make_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = dataclasses.replace(make_batch(), targets=np.zeros((4, 24), dtype=bool))
    metrics = Learner(make_model(), settings()).update(batch, 0)
    assert metrics["loss"] == 0
    assert math.isfinite(metrics["grad_norm"])


def test_bf16_compute_keeps_fp32_parameters(make_model: MakeModel, make_batch: MakeBatch) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = make_model()
        losses[dtype] = Learner(model, settings(dtype=dtype)).update(make_batch(), 0)["loss"]
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert 0 < abs(losses["bfloat16"] - losses["float32"]) < 0.05


def test_joint_mtp_without_modules_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="mtp_joint_from=0, but the model has no MTP modules"):
        Learner(make_model(mtp=0), settings(mtp_joint_from=0))
