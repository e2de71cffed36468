from __future__ import annotations

import pytest
import torch

from step35.model.context import Routing
from step35.train.balance import expert_counts, group_balance_loss, update_bias, without_padding


def routing(tokens: int = 17, experts: int = 6, top_k: int = 2) -> Routing:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(tokens, experts, generator=generator).requires_grad_()
    return Routing(0, probabilities, probabilities.detach().topk(top_k).indices)


def by_loops(record: Routing, groups: int) -> float:
    """Equation 1, one token and one expert at a time."""
    tokens, experts = record.probabilities_NE.shape
    size, choices = experts // groups, record.experts_NK.numel()
    total = 0.0
    for g in range(groups):
        members = range(g * size, (g + 1) * size)
        f = sum(1 for row in record.experts_NK.tolist() for e in row if e in members) / choices
        p = sum(sum(row[e] for e in members) / sum(row) for row in record.probabilities_NE.tolist()) / tokens
        total += f * p
    return groups * total


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_the_loss_equals_equation_1_by_loops(groups: int) -> None:
    record = routing()
    assert group_balance_loss(record, groups).item() == pytest.approx(by_loops(record, groups), rel=1e-5)


def test_it_is_1_for_even_groups_and_grows_to_their_number() -> None:
    even = Routing(0, torch.full((4, 4), 0.5), torch.tensor([[0, 2], [1, 3], [0, 3], [1, 2]]))
    assert group_balance_loss(even, 2).item() == pytest.approx(1.0)
    lopsided = Routing(0, torch.tensor([[0.9, 0.9, 0.0, 0.0]] * 4), torch.tensor([[0, 1]] * 4))
    assert group_balance_loss(lopsided, 2).item() == pytest.approx(2.0)


def test_its_gradient_lowers_the_probability_of_the_busy_group() -> None:
    probabilities = torch.full((4, 4), 0.5, requires_grad=True)
    record = Routing(0, probabilities, torch.tensor([[0, 1], [0, 1], [1, 0], [0, 2]]))
    group_balance_loss(record, 2).backward()
    assert probabilities.grad is not None
    assert (probabilities.grad[:, :2] > 0).all()
    assert (probabilities.grad[:, 2:] < 0).all()


def test_counts_include_idle_experts() -> None:
    record = Routing(0, torch.zeros(3, 5), torch.tensor([[0, 3], [3, 1], [3, 0]]))
    assert expert_counts(record).tolist() == [2, 1, 0, 3, 0]


def test_the_bias_rises_under_the_mean_and_falls_over_it() -> None:
    bias = torch.tensor([0.0, 1.0, -1.0, 0.5])
    update_bias(bias, torch.tensor([0, 9, 4, 3]), rate=0.1)
    torch.testing.assert_close(bias, torch.tensor([0.1, 0.9, -1.0, 0.6]))


def test_padding_is_no_load() -> None:
    record = routing(tokens=6)
    [found] = without_padding([record], torch.tensor([[0, 0, -1], [1, -1, -1]]))
    kept = [0, 1, 3]
    assert torch.equal(found.experts_NK, record.experts_NK[kept])
    assert torch.equal(found.probabilities_NE, record.probabilities_NE[kept])
    assert without_padding([record], torch.zeros(2, 3)) == [record]


def test_a_micro_batch_of_padding_alone_has_no_balance_loss() -> None:
    record = routing(tokens=4)
    [empty] = without_padding([record], torch.full((1, 4), -1))
    loss = group_balance_loss(empty, 3)
    loss.backward()
    assert loss.item() == 0
    assert record.probabilities_NE.grad is None or record.probabilities_NE.grad.isfinite().all()
