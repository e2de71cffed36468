from __future__ import annotations

import torch

from step35.post.rl.advantages import advantages, returns


def test_a_verdict_is_the_return_and_a_truncated_response_takes_the_critics_word() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    truncated = torch.tensor([False, False, True, True])
    final_values = torch.tensor([0.3, 0.4, 0.7, -0.2])
    assert torch.equal(returns(rewards, truncated, final_values), torch.tensor([1.0, 0.0, 0.7, -0.2]))


def test_advantages_are_return_minus_value_where_the_policy_acted() -> None:
    values = torch.tensor([[0.25, 0.5, 9.0], [0.0, 1.0, 0.5]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    result = advantages(torch.tensor([1.0, 0.5]), values, mask)
    assert torch.equal(result, torch.tensor([[0.75, 0.5, 0.0], [0.0, -0.5, 0.0]]))


def test_negative_advantages_may_be_scaled_down() -> None:
    values = torch.tensor([[0.25, 0.75]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    scaled = advantages(torch.tensor([0.5]), values, mask, negative_weight=0.2)
    assert torch.allclose(scaled, torch.tensor([[0.25, -0.05]]))
