from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from step35.model.step35 import Step35
from step35.train.monitors.matrices import CLASSES, UpdateSample, by_class, expert_norms, matrix_class, norms


def test_every_parameter_has_a_class_and_every_class_a_parameter(make_model: Callable[..., Step35]) -> None:
    names = [name for name, _ in make_model().named_parameters()]
    found = {name: matrix_class(name) for name in names}
    assert set(found.values()) == {label for label, _ in CLASSES}
    assert found["layers.2.attention.q_norm.weight"] == "norm"
    assert found["layers.2.attention.gate_proj.weight"] == "gate"
    assert found["layers.2.moe.experts.gate_up_proj"] == "experts_in"
    assert found["layers.2.moe.shared.gate_up_proj.weight"] == "shared"
    assert found["mtp.0.block.attention.qkv_proj.weight"] == "mtp"


def test_norms_are_those_of_clipping_bit_for_bit_and_classes_add_up(make_model: Callable[..., Step35]) -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    total, each = norms({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(total, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    classes = by_class(each, "grad_norm")
    assert sum(value**2 for value in classes.values()) == pytest.approx(float(total) ** 2, rel=1e-5)
    head = model.lm_head.weight.grad
    assert head is not None
    assert classes["grad_norm.head"] == pytest.approx(float(head.norm() * total), rel=1e-4)  # clipped meanwhile


def test_update_rms_is_in_units_of_the_rate_and_a_sample_is_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    named = {
        "lm_head.weight": torch.randn(500, 400, generator=generator),  # larger than the sample
        "norm.weight": torch.randn(40, generator=generator),
    }
    sample = UpdateSample(named)
    assert sample.before[0].numel() <= 2**13
    named["lm_head.weight"].sub_(1e-3 * 0.2 * torch.randn(500, 400, generator=generator))
    named["norm.weight"].sub_(1e-3)
    found = sample.rms(1e-3)
    assert found["update_rms.head"] == pytest.approx(0.2, rel=0.02)
    assert found["update_rms.norm"] == pytest.approx(1.0, rel=1e-3)
    assert sample.rms(0.0) == {}


def test_expert_norms_by_projection(make_model: Callable[..., Step35]) -> None:
    model = make_model()
    with torch.no_grad():
        model.layers[3].moe.experts.down_proj[2] *= 50
        model.layers[1].moe.experts.gate_up_proj[1, 16:] = 0  # the up half
    figures, panels = expert_norms(model)
    assert figures["expert_norm_max_ratio"] == pytest.approx(50, rel=0.2)
    assert figures["expert_norm_min_ratio"] == 0
    assert panels["expert_up_norm"][0][1] == 0
    assert panels["expert_gate_norm"][0][1] > 0
    expected = model.layers[3].moe.experts.down_proj[2].norm().item()
    assert panels["expert_down_norm"][2][2] == pytest.approx(expected, rel=1e-5)
