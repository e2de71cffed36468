from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from step35.train import muon
from step35.train.muon import BATCH_ELEMENTS, Matrices, Muon, batches
from step35.train.polar import polar_express

SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "dtype": torch.float32}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(parameter: Tensor, sizes: tuple[int, ...], gradients: list[Tensor], dim: int = 0) -> Tensor:
    """Return the parameter after one Muon step a gradient."""
    parameter = nn.Parameter(parameter.clone())
    optimiser = Muon([Matrices(parameter, dim, sizes)], **SETTINGS)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimiser.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_three_steps_equal_the_formula(shape: tuple[int, int]) -> None:
    weight, momentum = random(*shape, seed=1), torch.zeros(shape)
    gradients = [random(*shape, seed=10 + i) for i in range(3)]
    ours = stepped(weight, (shape[0],), gradients)
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient
        nesterov = 0.1 * gradient + 0.9 * momentum
        direction = polar_express(nesterov, dtype=torch.float32)
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(shape) ** 0.5 * direction
    torch.testing.assert_close(ours, weight, rtol=1e-5, atol=1e-6)


def test_all_but_the_orthogonalisation_equals_torchs_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch keeps the sum of gradients where we keep their mean: another length, the same direction.
    monkeypatch.setattr(
        torch.optim._muon, "_zeropower_via_newtonschulz", lambda g, *unused: polar_express(g, dtype=torch.float32)
    )
    gradients = [random(6, 10, seed=i) for i in range(5)]
    theirs = nn.Parameter(random(6, 10, seed=9))
    optimiser = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimiser.step()
    torch.testing.assert_close(stepped(random(6, 10, seed=9), (6,), gradients), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_the_update_has_an_rms_of_about_a_fifth_of_the_rate() -> None:
    # 0.2 sqrt(max(rows, columns)) times an orthogonal factor: what AdamW's updates measure.
    before, gradient = torch.zeros(16, 64), random(16, 64)
    update = stepped(before, (16,), [gradient])
    assert update.square().mean().sqrt().item() == pytest.approx(0.02 * 0.2, rel=0.02)


def test_weight_decay_shrinks_by_rate_times_decay() -> None:
    weight = random(4, 6)
    torch.testing.assert_close(stepped(weight, (4,), [torch.zeros(4, 6)]), weight * (1 - 0.02 * 0.1))


def test_packed_rows_are_updated_as_the_separate_matrices_they_are() -> None:
    weight, gradients = random(20, 8, seed=1), [random(20, 8, seed=2), random(20, 8, seed=3)]
    sizes = (12, 4, 4)
    together = stepped(weight, sizes, gradients)
    parts = zip(weight.split(sizes), *(g.split(sizes) for g in gradients), strict=True)
    separate = torch.cat([stepped(part, (len(part),), list(grads)) for part, *grads in parts])
    assert torch.equal(together, separate)
    assert (together - stepped(weight, (20,), gradients)).abs().max() > 1e-3  # one big matrix would be another update


@pytest.mark.parametrize(("sizes", "dim"), [((6, 6), 1), ((5,), 0)])
def test_experts_are_updated_as_the_separate_matrices_they_are(sizes: tuple[int, ...], dim: int) -> None:
    # (experts, 2 * hidden, model) with gate and up packed in dimension 1, and (experts, rows, columns) in one piece.
    weight, gradient = random(5, 12, 8, seed=1), random(5, 12, 8, seed=2)
    gradient *= torch.logspace(-3, 3, 5)[:, None, None]  # an idle expert and a busy one move equally far
    together = stepped(weight, sizes, [gradient], dim=dim)
    rows = sizes if dim == 1 else (12,)
    for e in range(5):
        parts = zip(weight[e].split(rows), gradient[e].split(rows), strict=True)
        separate = torch.cat([stepped(w, (len(w),), [g]) for w, g in parts])
        assert torch.equal(together[e], separate)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    idle, busy = nn.Parameter(random(4, 6)), nn.Parameter(random(6, 4, seed=1))
    optimiser = Muon([Matrices(idle, 0, (4,)), Matrices(busy, 0, (6,))], **SETTINGS)
    busy.grad = random(6, 4, seed=2)
    before = busy.detach().clone()
    optimiser.step()
    assert torch.equal(idle, random(4, 6))
    assert idle not in optimiser.state
    assert not torch.equal(busy, before)


def test_batches_hold_each_matrix_once_with_others_of_its_shape_only() -> None:
    shapes = [torch.Size(s) for s in [(4, 6), (6, 4), (5, 5), (4, 6)] * 5 + [(1 << 10, 1 << 10)]]
    found = list(batches(shapes, "cpu"))
    assert sorted(number for numbers in found for number in numbers) == list(range(len(shapes)))
    assert [len(numbers) for numbers in found] == [10, 5, 5, 1]
    for numbers in found:
        assert len({shapes[i] for i in numbers}) == 1


def test_small_batches_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gradient = random(9, 12, 8, seed=1), random(9, 12, 8, seed=2)
    whole = stepped(weight, (12,), [gradient], dim=1)
    monkeypatch.setitem(BATCH_ELEMENTS, "cpu", 2 * 12 * 8)
    assert max(map(len, muon.batches([torch.Size((12, 8))] * 9, "cpu"))) == 2
    assert torch.equal(stepped(weight, (12,), [gradient], dim=1), whole)


def test_the_state_resumes() -> None:
    gradients = [random(6, 4, seed=i) for i in range(4)]
    unbroken = stepped(random(6, 4, seed=9), (6,), gradients)
    parameter = nn.Parameter(stepped(random(6, 4, seed=9), (6,), gradients[:2]))
    first = nn.Parameter(random(6, 4, seed=9))
    before = Muon([Matrices(first, 0, (6,))], **SETTINGS)
    for gradient in gradients[:2]:
        first.grad = gradient.clone()
        before.step()
    resumed = Muon([Matrices(parameter, 0, (6,))], **SETTINGS)
    resumed.load_state_dict(before.state_dict())
    for gradient in gradients[2:]:
        parameter.grad = gradient.clone()
        resumed.step()
    assert torch.equal(parameter, unbroken)


def test_the_largest_rms_of_singular_values_names_its_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nn.Parameter(random(3, 8, 16)), nn.Parameter(random(16, 8, seed=1))
    optimiser = Muon([Matrices(first, 1, (8,)), Matrices(second, 0, (16,))], **SETTINGS)
    assert optimiser.largest_rms() is None
    first.grad, second.grad = random(3, 8, 16, seed=2), random(16, 8, seed=3)
    optimiser.step()
    found = optimiser.largest_rms()
    assert found is not None
    assert found[0] == pytest.approx(1.0, abs=0.05)
    first.grad, second.grad = random(3, 8, 16, seed=4), torch.ones(16, 8)  # rank 1
    monkeypatch.setattr(muon, "polar_express", lambda g, **unused: g * (1 if g.shape[-2] == 16 else 0))
    optimiser.step()
    rms, owner = optimiser.largest_rms() or (0.0, None)
    assert owner is second
    assert rms == pytest.approx(float(second.grad.norm()) / 8**0.5, rel=1e-5)  # the gradient holds the look-ahead
