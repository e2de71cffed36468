from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from step35.config.rl import MISPOConfig
from step35.post.rl.mis_po import mis_filter, mis_po_loss

CONFIG = MISPOConfig(token_low=0.5, token_high=2.0, trajectory_low=0.9, trajectory_high=1.1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def logprobs() -> tuple[Tensor, Tensor, Tensor]:
    """Return old, infer and mask of 40 responses whose ratios fall on both sides of both bands."""
    infer = -random(40, 9).abs()
    old = infer + 0.4 * random(40, 9, seed=1)
    mask = random(40, 9, seed=2) > -0.5
    return old, torch.where(mask, infer, 777.0), mask  # what the policy did not choose must not count


def by_loops(old: Tensor, infer: Tensor, mask: Tensor) -> tuple[list[list[bool]], list[bool], list[list[bool]]]:
    """Return which tokens pass, which responses pass, and which tokens pass both."""
    tokens, responses, both = [], [], []
    for b in range(len(mask)):
        ratios = [math.exp(old[b, t] - infer[b, t]) for t in range(mask.shape[1]) if mask[b, t]]
        mean = math.prod(ratios) ** (1 / len(ratios)) if ratios else 1.0
        responses.append(0.9 <= mean <= 1.1)
        remaining = iter(ratios)
        tokens.append([0.5 <= next(remaining) <= 2.0 if acted else False for acted in mask[b].tolist()])
        both.append([token and responses[-1] for token in tokens[-1]])
    return tokens, responses, both


def test_the_filter_equals_loops(logprobs: tuple[Tensor, Tensor, Tensor]) -> None:
    old, infer, mask = logprobs
    tokens, responses, both = by_loops(old, infer, mask)
    passed = mis_filter(old, infer, mask, CONFIG)
    assert passed.kept_BT.tolist() == both
    assert 5 < sum(responses) < 35
    assert sum(map(sum, both)) < sum(map(sum, tokens)) < mask.sum()
    seen = [math.exp(old[b, t] - infer[b, t]) for b, t in mask.nonzero().tolist()]
    assert passed.diagnostics == pytest.approx(
        {
            "accept_tokens": sum(map(sum, tokens)) / int(mask.sum()),
            "accept_trajectories": sum(responses) / 40,
            "ratio_mean": sum(seen) / len(seen),
            "ratio_min": min(seen),
            "ratio_max": max(seen),
            "kl": sum(r - 1 - math.log(r) for r in seen) / len(seen),
        },
        rel=1e-4,
    )


def test_bounds_are_inclusive_and_each_side_filters() -> None:
    config = MISPOConfig(token_low=0.5, token_high=2.0, trajectory_low=1e-9, trajectory_high=1e9)
    ratios = torch.tensor([[0.49, 0.51, 1.0, 1.99, 2.01]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert mis_filter(ratios.log(), torch.zeros(1, 5), mask, config).kept_BT.tolist() == [
        [False, True, True, True, False]
    ]
    exact = mis_filter(torch.zeros(1, 5), torch.zeros(1, 5), mask, MISPOConfig(trajectory_low=1.0, trajectory_high=1.0))
    assert exact.kept_BT.all()


def test_one_outlier_fails_its_token_and_many_small_ones_the_response() -> None:
    mask = torch.ones(3, 50, dtype=torch.bool)
    old = torch.zeros(3, 50)
    old[0, 7] = math.log(3)  # e^(log 3 / 50) = 1.022: only the token
    old[1] = -0.2  # every token is fine, their mean is not
    passed = mis_filter(old, torch.zeros(3, 50), mask, CONFIG)
    assert passed.kept_BT.sum(1).tolist() == [49, 0, 50]
    assert not passed.kept_BT[0, 7]


def test_a_response_without_tokens_keeps_none() -> None:
    passed = mis_filter(random(2, 4), random(2, 4, seed=1), torch.zeros(2, 4, dtype=torch.bool), CONFIG)
    assert not passed.kept_BT.any()
    assert all(math.isfinite(value) for value in passed.diagnostics.values())


def test_the_loss_is_a_mean_over_kept_tokens_only(logprobs: tuple[Tensor, Tensor, Tensor]) -> None:
    old, infer, mask = logprobs
    kept = mis_filter(old, infer, mask, CONFIG).kept_BT
    now, advantages = random(40, 9, seed=5).requires_grad_(), random(40, 9, seed=6).requires_grad_()
    loss = mis_po_loss(now, advantages, kept)
    places = kept.nonzero().tolist()
    expected = -sum(now[b, t].item() * advantages[b, t].item() for b, t in places) / len(places)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert advantages.grad is None
    torch.testing.assert_close(now.grad[kept], -advantages.detach()[kept] / len(places))
    assert (now.grad[~kept] == 0).all()


def test_a_filtered_response_has_exactly_no_gradient_even_where_it_is_not_finite() -> None:
    now = torch.tensor([[-1.0, -2.0], [-math.inf, -3.0]], requires_grad=True)
    kept = torch.tensor([[True, True], [False, False]])
    loss = mis_po_loss(now, torch.ones(2, 2), kept)
    loss.backward()
    assert loss.item() == pytest.approx(1.5)
    assert now.grad.tolist() == [[-0.5, -0.5], [0.0, 0.0]]


def test_nothing_kept_costs_nothing() -> None:
    now = torch.full((2, 3), -1.0, requires_grad=True)
    loss = mis_po_loss(now, torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert torch.equal(now.grad, torch.zeros(2, 3))
