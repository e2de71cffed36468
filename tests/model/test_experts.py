from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from step35.model.context import Context
from step35.model.experts import Experts
from step35.model.mlp import swiglu
from step35.model.router import Router
from step35.model.step35 import Step35

N, D, I, E, K = 13, 32, 8, 6, 2
IDLE = 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def experts() -> Experts:
    module = Experts(D, I, E, clip=0.5)
    with torch.no_grad():
        module.gate_up_proj.copy_(random(E, 2 * I, D, seed=1) * D**-0.5)
        module.down_proj.copy_(random(E, D, I, seed=2) * I**-0.5)
    return module


@pytest.fixture
def chosen_NK() -> Tensor:
    """Two different experts a token, never `IDLE`."""
    scores = torch.rand(N, E, generator=torch.Generator().manual_seed(3))
    scores[:, IDLE] = 0
    return scores.topk(K).indices


def token_by_token(experts: Experts, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    """The definition: for each token, the weighted sum of its experts' outputs."""
    rows = []
    for x, weights, chosen in zip(x_ND, weights_NK, chosen_NK.tolist(), strict=True):
        outputs = []
        for weight, e in zip(weights, chosen, strict=True):
            gate, up = (experts.gate_up_proj[e] @ x).split(I)
            hidden = F.silu(gate).clamp(max=experts.clip) * up.clamp(-experts.clip, experts.clip)
            outputs.append(weight * (experts.down_proj[e] @ hidden))
        rows.append(sum(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("path", ["reference", "grouped", "gathered"])
def test_every_path_equals_the_definition_forward_and_backward(experts: Experts, chosen_NK: Tensor, path: str) -> None:
    results = []
    for compute in (token_by_token, getattr(Experts, path)):
        x, weights = random(N, D).requires_grad_(), random(N, K, seed=4).requires_grad_()
        y = compute(experts, x, weights, chosen_NK)
        inputs = (x, weights, experts.gate_up_proj, experts.down_proj)
        results.append([y, *torch.autograd.grad((y * random(N, D, seed=5)).sum(), inputs)])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (results[1][3][IDLE] == 0).all()


@pytest.mark.parametrize("path", ["grouped", "gathered"])
def test_the_fast_paths_agree_in_bf16_on_fp32_weights(experts: Experts, chosen_NK: Tensor, path: str) -> None:
    x, weights = random(N, D).bfloat16(), random(N, K, seed=4)
    expected = experts.reference(x, weights, chosen_NK)
    ours = getattr(experts, path)(x, weights, chosen_NK)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.03)


def test_a_few_tokens_without_gradient_give_the_same(experts: Experts) -> None:
    chosen = torch.tensor([[5, 0], [2, 5]])
    x, weights = random(2, D), random(2, K, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(experts(x, weights, chosen), experts.reference(x, weights, chosen))


def test_an_observer_sees_the_rows_of_each_token_and_expert(experts: Experts, chosen_NK: Tensor) -> None:
    x_ND, seen = random(N, D), []
    plain = experts.grouped(x_ND, random(N, K, seed=4), chosen_NK)
    assert torch.equal(experts.grouped(x_ND, random(N, K, seed=4), chosen_NK, seen.append), plain)
    [rows] = seen
    pairs = list(zip(rows.token_R.tolist(), rows.expert_R.tolist(), strict=True))
    assert sorted(pairs) == sorted((n, e) for n, chosen in enumerate(chosen_NK.tolist()) for e in chosen)
    for (token, expert), hidden, active, out in zip(pairs, rows.hidden_R2I, rows.active_RI, rows.out_RD, strict=True):
        torch.testing.assert_close(hidden, experts.gate_up_proj[expert] @ x_ND[token])
        gate, up = hidden.split(I)
        torch.testing.assert_close(active, F.silu(gate).clamp(max=0.5) * up.clamp(-0.5, 0.5))
        torch.testing.assert_close(out, experts.down_proj[expert] @ active)
        assert not out.requires_grad


def test_the_gate_is_clipped_after_silu_from_above_and_up_on_both_sides() -> None:
    def clipped(gate: float, up: float, clip: float) -> float:
        return swiglu(torch.tensor([gate, up]), clip).item()

    def silu(x: float) -> float:
        return F.silu(torch.tensor(x)).item()

    assert clipped(9.0, 1.0, 7.0) == pytest.approx(7.0)
    assert clipped(0.6, 0.3, 0.5) == pytest.approx(0.3 * silu(0.6))  # above the limit before SiLU, below it after
    assert clipped(-1.2, 0.05, 0.1) == pytest.approx(0.05 * silu(-1.2))  # -0.278, not -0.1
    assert clipped(1.0, 3.0, 2.0) == pytest.approx(2 * silu(1.0))
    assert clipped(1.0, -3.0, 2.0) == pytest.approx(-2 * silu(1.0))
    assert clipped(50.0, -30.0, 0.0) == pytest.approx(-1500.0)  # 0 is off


@pytest.fixture
def router() -> Router:
    module = Router(D, E, K, scale=3.0)
    with torch.no_grad():
        module.weight.copy_(random(E, D, seed=6) * D**-0.5)
    return module


def test_weights_are_renormalised_and_scaled_probabilities_of_the_chosen(router: Router) -> None:
    x_ND = random(N, D)
    weights_NK, chosen_NK, probabilities_NE = router(x_ND)
    for n in range(N):
        p = torch.sigmoid(router.weight @ x_ND[n])
        torch.testing.assert_close(probabilities_NE[n], p)
        best = sorted(range(E), key=lambda e: -p[e].item())[:K]
        assert set(chosen_NK[n].tolist()) == set(best)
        for k, e in enumerate(chosen_NK[n].tolist()):
            torch.testing.assert_close(weights_NK[n, k], 3.0 * p[e] / sum(p[b] for b in best))
    torch.testing.assert_close(weights_NK.sum(-1), torch.full((N,), 3.0))


def test_the_bias_selects_but_never_weighs(router: Router) -> None:
    x_ND = random(N, D)
    _, _, plain_NE = router(x_ND)
    router.bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0, 9.0, 0.0]))
    weights_NK, chosen_NK, probabilities_NE = router(x_ND)
    assert {tuple(sorted(row)) for row in chosen_NK.tolist()} == {(2, 4)}
    assert torch.equal(probabilities_NE, plain_NE)
    p_NK = plain_NE.gather(1, chosen_NK)
    torch.testing.assert_close(weights_NK, 3.0 * p_NK / p_NK.sum(-1, keepdim=True))
    weights_NK[:, 0].sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad[[2, 4]].abs().min(-1).values.max() > 0
    assert (router.weight.grad[[0, 1, 3, 5]] == 0).all()


def test_routing_is_fp32_even_for_bf16_activations(router: Router) -> None:
    x_ND = random(N, D).bfloat16()
    weights_NK, _, probabilities_NE = router(x_ND)
    assert weights_NK.dtype == probabilities_NE.dtype == torch.float32
    exact = torch.sigmoid(x_ND.double() @ router.weight.double().T)
    assert (probabilities_NE - exact).abs().max() < 1e-6


@torch.no_grad()
def test_the_layer_adds_routed_and_shared_experts_and_records_its_choices(make_model: Callable[..., Step35]) -> None:
    moe = make_model().layers[2].moe
    x_BTD = random(2, 7, 32)
    x_ND = x_BTD.flatten(0, 1)
    weights_NK, chosen_NK, probabilities_NE = moe.router(x_ND)
    gate, up = F.linear(x_ND, moe.shared.gate_up_proj.weight).chunk(2, -1)
    expected = F.linear(F.silu(gate) * up, moe.shared.down_proj.weight)
    expected += moe.experts.reference(x_ND, weights_NK, chosen_NK)
    tokens = torch.zeros(2, 7, dtype=torch.long)
    context = Context.packed(tokens, record=True)
    torch.testing.assert_close(moe(x_BTD, context).flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moe(x_BTD, Context.packed(tokens)).flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    assert context.routing is not None
    [record] = context.routing
    assert record.layer == 2
    assert torch.equal(record.experts_NK, chosen_NK)
    assert torch.equal(record.probabilities_NE, probabilities_NE)


def test_clips_are_taken_from_the_layer(make_model: Callable[..., Step35]) -> None:
    model = make_model()
    assert [layer.moe.experts.clip for layer in model.layers[1:]] == [0.0, 0.4, 0.0, 0.4]
    assert [layer.moe.shared.clip for layer in model.layers[1:]] == [0.0, 0.0, 0.0, 0.4]
    assert model.layers[0].mlp.clip == 0.4
