from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from step35.data.packing import Batch
from step35.train import loss as losses

N, D, V = 23, 16, 50


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("rows", [1, 4, 23, 1000])
def test_chunks_equal_cross_entropy_forward_and_backward(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", rows)
    results = []
    for chunked in (False, True):
        h, weight = random(N, D).requires_grad_(), random(V, D, seed=1).requires_grad_()
        if chunked:
            total = losses.summed_cross_entropy(h, weight, TARGETS)
        else:
            total = F.cross_entropy(h @ weight.T, TARGETS, reduction="sum")
        results.append([total.detach(), *torch.autograd.grad(0.37 * total, (h, weight))])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_bf16_states_keep_fp32_loss_and_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", 4)
    h, weight = random(N, D).bfloat16().requires_grad_(), random(V, D, seed=1).requires_grad_()
    total = losses.summed_cross_entropy(h, weight, TARGETS)
    ours = torch.autograd.grad(total, (h, weight))
    exact_h, exact_weight = h.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_h @ exact_weight.T, TARGETS, reduction="sum")
    expected = torch.autograd.grad(exact, (exact_h, exact_weight))
    assert (total.dtype, ours[0].dtype, ours[1].dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert total.item() == pytest.approx(exact.item(), rel=0.01)
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 0.02


def test_nothing_to_score_costs_nothing() -> None:
    h, weight = torch.empty(0, D, requires_grad=True), random(V, D).requires_grad_()
    total = losses.summed_cross_entropy(h, weight, torch.empty(0, dtype=torch.long))
    assert total == 0
    total.backward()
    assert torch.equal(weight.grad, torch.zeros(V, D))


def test_a_certain_miss_costs_at_most_87_nats_and_its_gradient_is_finite() -> None:
    h, weight = torch.tensor([[1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    total = losses.summed_cross_entropy(h, weight, torch.tensor([1]))
    assert total.item() == pytest.approx(87.3, abs=0.1)
    total.backward()
    assert h.grad.item() == pytest.approx(2.0)


def test_a_state_that_is_not_finite_shows_in_the_loss() -> None:
    assert losses.summed_cross_entropy(torch.full((1, D), torch.nan), random(V, D), torch.tensor([0])).isnan()


def scored_pairs(batch: Batch, ahead: int) -> set[tuple[int, int]]:
    """Return (row, column) of every position that may predict the token `ahead` of it."""
    rows, columns = batch.tokens.shape
    return {
        (b, t)
        for b in range(rows)
        for t in range(columns - ahead)
        if batch.segments[b, t] == batch.segments[b, t + ahead] >= 0 and batch.targets[b, t + ahead]
    }


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_only_targets_of_the_same_document_are_scored(make_batch: Callable[..., Batch], ahead: int) -> None:
    batch = make_batch()
    ours = losses.scored(torch.as_tensor(batch.segments), torch.as_tensor(batch.targets), ahead)
    expected = scored_pairs(batch, ahead)
    assert set(zip(*(x.tolist() for x in ours.nonzero(as_tuple=True)), strict=True)) == expected
    assert 10 < len(expected) < batch.tokens.size


def test_no_row_predicts_across_a_border_or_into_padding() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1]])
    targets = torch.tensor([[False, True, True, False, True, True, True, True]])  # padding claims to be targets
    for ahead, rows in ((1, [0, 1, 3]), (2, [0])):
        assert losses.scored(segments, targets, ahead)[0].nonzero()[:, 0].tolist() == rows


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_row_t_is_scored_against_token_t_plus_ahead(make_batch: Callable[..., Batch], ahead: int) -> None:
    """States that know exactly one token, the one at t + offset: only offset == ahead makes the loss vanish."""
    batch = make_batch()
    tokens, segments, targets = (torch.as_tensor(x) for x in (batch.tokens, batch.segments, batch.targets))
    count = len(scored_pairs(batch, ahead))
    mean = {}
    for offset in (ahead - 1, ahead, ahead + 1):
        known = torch.as_tensor(np.roll(batch.tokens, -offset, axis=1))
        h_BTD = 30.0 * F.one_hot(known, 97).float()
        total = losses.prediction_loss(h_BTD, torch.eye(97), tokens, segments, targets, ahead=ahead)
        mean[offset] = total.item() / count
    assert mean[ahead] < 1e-6
    assert min(mean[ahead - 1], mean[ahead + 1]) > 20


def test_the_loss_is_the_sum_over_scored_positions(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch()
    tokens, segments, targets = (torch.as_tensor(x) for x in (batch.tokens, batch.segments, batch.targets))
    h_BTD, weight = random(*batch.tokens.shape, D), random(97, D, seed=1)
    log_p = (h_BTD @ weight.T).log_softmax(-1)
    expected = -sum(log_p[b, t, tokens[b, t + 2]].item() for b, t in scored_pairs(batch, 2))
    ours = losses.prediction_loss(h_BTD, weight, tokens, segments, targets, ahead=2)
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_module_weights_share_the_total_in_geometric_proportion() -> None:
    assert losses.mtp_weights(0.3, 0.6, 1) == pytest.approx([0.3])
    assert losses.mtp_weights(0.3, 0.5, 3) == pytest.approx([0.3 * 4 / 7, 0.3 * 2 / 7, 0.3 / 7])
    assert losses.mtp_weights(0.6, 1.0, 3) == pytest.approx([0.2] * 3)
    assert losses.mtp_weights(0.3, 0.6, 0) == []


def test_without_gradients_the_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", 3)
    h, weight, targets = random(7, 5), random(11, 5, seed=1), torch.tensor([0, 3, 10, 3, 5, 7, 1])
    with torch.no_grad():
        found = losses.summed_cross_entropy(h, weight, targets)
        assert losses.summed_cross_entropy(h[:0], weight, targets[:0]).item() == 0
    assert found.item() == pytest.approx(losses.summed_cross_entropy(h, weight, targets).item(), rel=1e-6)
