from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from step35.config.train import MuonConfig, TrainConfig
from step35.data.packing import Batch
from step35.model.step35 import Step35
from step35.train.master import Masters
from step35.train.step import Learner

MakeModel = Callable[..., Step35]
MakeBatch = Callable[..., Batch]


def settings(**changes: Any) -> TrainConfig:
    values = {
        "steps": 100, "batch_rows": 4, "micro_rows": 4, "context": 24, "warmup_steps": 0, "lr": 0.02, "final_lr": 0.02,
        "param_dtype": "bfloat16", "dtype": "float32", "optim": MuonConfig(iteration_dtype="float32"),
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def weights(model: Step35) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_model_holds_the_rounded_masters_and_the_router_stays_fp32(
    make_model: MakeModel, make_batch: MakeBatch
) -> None:
    learner = Learner(make_model(), settings())
    for step in range(3):
        learner.update(make_batch(seed=step), step)
    for name, parameter in learner.model.named_parameters():
        master = learner.masters.named[name]
        assert master.dtype == torch.float32
        if "router." in name:
            assert parameter is master
        else:
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, master.bfloat16())
            assert parameter.grad is None
            assert not torch.equal(master, parameter.float())  # it knows digits that the weight does not
    assert all(layer.moe.router.bias.dtype == torch.float32 for layer in learner.model.layers if layer.moe)


def test_updates_below_the_resolution_of_bf16_add_up(make_model: MakeModel, make_batch: MakeBatch) -> None:
    # At this rate one update of a norm's weight, which AdamW moves by about the rate, is far below half a bf16 step.
    config = settings(lr=4e-5, final_lr=4e-5, weight_decay=0.0)
    learner = Learner(make_model(), config)
    name = "layers.2.ffn_norm.weight"
    start = learner.model.get_parameter(name).detach().clone()
    large = start.abs() > 0.1
    lost = start.clone()  # what the same updates make of a weight without a master
    for step in range(40):
        before = learner.masters.named[name].detach().clone()
        learner.update(make_batch(), step)
        lost += (learner.masters.named[name].detach() - before).bfloat16()
        if step == 0:
            assert torch.equal(learner.model.get_parameter(name)[large], start[large])
    moved = (learner.model.get_parameter(name) != start) & large
    assert torch.equal(lost[large], start[large])
    assert moved.sum() > large.sum() / 2


def test_training_with_masters_follows_fp32_weights(make_model: MakeModel, make_batch: MakeBatch) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        changes = {"param_dtype": dtype, "dtype": "bfloat16", "mtp_weight": 0.0, "lr": 0.005, "final_lr": 0.005}
        learner = Learner(make_model(), settings(**changes))
        losses[dtype] = [learner.update(make_batch(rows=2, tokens=16), step)["loss"] for step in range(20)]
    # With bf16 products both round the same matrices; they part by the rounding of norms and gradients.
    assert losses["bfloat16"][0] == pytest.approx(losses["float32"][0], rel=3e-3)
    assert losses["bfloat16"][-1] < 0.5 * losses["bfloat16"][0]
    assert losses["bfloat16"][-1] == pytest.approx(losses["float32"][-1], rel=0.1)


def test_micro_batches_add_up_in_fp32(make_model: MakeModel, make_batch: MakeBatch) -> None:
    seen = []
    for rows, dtype in ((4, "float32"), (4, "bfloat16"), (1, "bfloat16")):
        config = settings(micro_rows=rows, param_dtype=dtype, ep_weight=0.0, grad_clip=1e9)
        learner = Learner(make_model(), config)
        found: dict[str, Tensor] = {}

        def look(*unused: object, learner: Learner = learner, found: dict[str, Tensor] = found) -> None:
            found |= {k: p.grad.clone() for k, p in learner.masters.named.items() if p.grad is not None}

        learner.optimisers[0].register_step_pre_hook(look)
        learner.update(make_batch(), 0)
        seen.append(found)
    exact, whole, split = seen
    assert exact.keys() == whole.keys() == split.keys()
    for name, gradient in split.items():
        assert gradient.dtype == torch.float32
        assert (gradient - whole[name]).norm() < 0.01 * whole[name].norm() + 1e-6, name
        if "router" not in name:  # sums of bf16 gradients that are no bf16 numbers themselves
            assert not torch.equal(gradient, gradient.bfloat16().float()), name


def test_resume_is_bit_exact_and_a_checkpoint_holds_the_masters(make_model: MakeModel, make_batch: MakeBatch) -> None:
    unbroken = Learner(make_model(), settings(mtp_joint_from=3))
    for step in range(6):
        if step == 2:
            file = io.BytesIO()
            torch.save(unbroken.state_dict(), file)
        unbroken.update(make_batch(seed=step), step)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
    resumed = Learner(make_model(seed=7), settings(mtp_joint_from=3))
    resumed.load_state_dict(state)
    for step in range(2, 6):
        resumed.update(make_batch(seed=step), step)
    for (name, ours), theirs in zip(resumed.masters.named.items(), unbroken.masters.named.values(), strict=True):
        assert torch.equal(ours, theirs), name
    for name, tensor in weights(resumed.model).items():
        assert torch.equal(tensor, weights(unbroken.model)[name]), name


@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_may_go_on_in_the_other_dtype(
    make_model: MakeModel, make_batch: MakeBatch, before: str, after: str
) -> None:
    first = Learner(make_model(), settings(param_dtype=before))
    first.update(make_batch(), 0)
    second = Learner(make_model(seed=7), settings(param_dtype=after))
    second.load_state_dict(first.state_dict())
    for name, master in first.masters.named.items():
        assert torch.equal(second.masters.named[name], master), name
    second.update(make_batch(), 1)


def test_adopting_keeps_masters_whose_weight_did_not_change(make_model: MakeModel) -> None:
    model = make_model()
    exact = weights(model)
    masters = Masters(model, torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[0] = 2.0
    masters.adopt()
    head = masters.named["lm_head.weight"]
    assert (head[0] == 2.0).all()
    assert torch.equal(head[1:], exact["lm_head.weight"][1:])
    assert torch.equal(masters.named["embed_tokens.weight"], exact["embed_tokens.weight"])


def test_joining_modules_start_as_clones(make_model: MakeModel, make_batch: MakeBatch) -> None:
    learner = Learner(make_model(), settings(mtp_joint_from=0, lr=1e-30, final_lr=0.0, weight_decay=0.0))
    learner.update(make_batch(), 0)
    for name, tensor in learner.model.mtp[0].state_dict().items():
        assert torch.equal(learner.model.mtp[1].state_dict()[name], tensor), name
