"""The compiled kernels between products, and the experts' products, against the torch code that they replace.

That code runs for fp64, which the kernels do not take: each function is called twice, and its output and all its
gradients compared.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from step35.model.attention import gate
from step35.model.compiled import library
from step35.model.compiled.grouped import Grouped, add_product, fits_grouped
from step35.model.compiled.pointwise import Combine, Dispatch, squares
from step35.model.context import Context
from step35.model.experts import Experts
from step35.model.mlp import swiglu
from step35.model.norm import rms_norm
from step35.model.step35 import Step35
from step35.runtime.compiled import find_compiler
from step35.train.loss import summed_cross_entropy

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
Function = Callable[..., Tensor]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(function: Function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the function's output and each input's gradient; inputs are rounded to bf16, so that all can agree."""
    leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
    y = function(*leaves)
    direction = random(*y.shape, seed=99).bfloat16()
    return [y.detach(), *torch.autograd.grad(y, leaves, direction.to(y.dtype))]


def turned(model: Step35, index: int) -> Function:
    """Return layer `index`'s norm and rotation of queries and keys, as one tensor with the values."""
    attention = model.layers[index].attention
    context = Context.packed(torch.zeros(2, 37, dtype=torch.long))

    def function(heads: Tensor, weight_q: Tensor, weight_k: Tensor) -> Tensor:
        attention.q_norm.weight, attention.k_norm.weight = weight_q, weight_k
        cos, sin = (x.to(heads.dtype) for x in context.rope(attention.layer, torch.float32))
        return torch.cat(attention._normed_and_turned(heads, cos, sin), dim=2)

    for norm in (attention.q_norm, attention.k_norm):
        del norm.weight
    return function


def cases(make_model: Callable[..., Step35]) -> dict[str, tuple[Function, list[Tensor]]]:
    made: dict[str, tuple[Function, list[Tensor]]] = {
        "norm": (lambda x, w: rms_norm(x, w, 1e-5), [random(3, 101, 48), random(48, seed=1)]),
        "swiglu": (lambda x: swiglu(x, 0.0), [3 * random(129, 96)]),
        "swiglu, clipped": (lambda x: swiglu(x, 0.7), [3 * random(129, 96)]),
        "gate": (gate, [random(2, 33, 3, 32), 4 * random(2, 33, 3, seed=1)]),
    }
    for index in (0, 1):  # full with partial rotation, sliding
        model = make_model()
        layer = model.layers[index].attention.layer
        heads = random(2, 37, layer.heads + 2 * layer.kv_heads, 16)
        made[f"turned, layer {index}"] = turned(model, index), [heads, random(16, seed=1), random(16, seed=2)]
    return made


NAMES = ("norm", "swiglu", "swiglu, clipped", "gate", "turned, layer 0", "turned, layer 1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_equal_torch(name: str, dtype: torch.dtype, make_model: Callable[..., Step35]) -> None:
    function, inputs = cases(make_model)[name]
    assert library.fits(inputs[0])
    ours, reference = (results(function, inputs, d) for d in (dtype, torch.float64))
    for a, b in zip(ours, reference, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).norm() / b.norm()) < TOLERANCE[dtype]


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("name", NAMES)
def test_threads_change_no_bit(name: str, make_model: Callable[..., Step35]) -> None:
    function, inputs = cases(make_model)[name]
    made = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        made.append(results(function, inputs, torch.float32))
    assert all(torch.equal(a, b) for one, other in pairwise(made) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_no_number_stays_no_number(name: str, dtype: torch.dtype, make_model: Callable[..., Step35]) -> None:
    # A clip must not hide that a layer has blown up.
    function, inputs = cases(make_model)[name]
    x = inputs[0].clone()
    x.view(-1)[5] = torch.nan
    with torch.no_grad():
        ours, torchs = function(*(y.to(dtype) for y in (x, *inputs[1:]))), function(x.double(), *inputs[1:])
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert ours.isnan().any()


def routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Return weights and chosen experts; the last expert gets no row."""
    chosen = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)])
    return random(tokens, top_k, seed=5).sigmoid(), chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "hidden", "inner"), [(1, 32, 16), (70, 48, 32), (301, 128, 80)])
def test_experts_equal_the_reference(dtype: torch.dtype, tokens: int, hidden: int, inner: int) -> None:
    torch.manual_seed(0)
    experts = Experts(hidden, inner, 5, clip=0.9)
    weights, chosen = routing(tokens, 5, 3)
    matrices = [random(5, 2 * inner, hidden, seed=1) / hidden**0.5, random(5, hidden, inner, seed=2) / inner**0.5]
    del experts.gate_up_proj, experts.down_proj

    def run(path: str) -> Function:
        def function(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            experts.gate_up_proj, experts.down_proj = gate_up, down
            assert path == "reference" or fits_grouped(x, gate_up)
            return getattr(experts, path)(x, weights.float() if path == "grouped" else weights, chosen)

        return function

    inputs = [random(tokens, hidden), weights, *matrices]
    ours, reference = results(run("grouped"), inputs, dtype), results(run("reference"), inputs, torch.float64)
    tolerance = 5e-6 if dtype == torch.float32 else 4e-2  # in bf16 some rows fall on the clip's other side
    for a, b in zip(ours, reference, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < tolerance
    assert not ours[3][4].any()  # of the expert without rows


def test_fp32_matrices_multiply_bf16_rows_and_get_fp32_gradients() -> None:
    rows, weight, ends = random(90, 64).bfloat16(), random(3, 48, 64, seed=1), torch.tensor([33, 33, 90]).int()
    leaf = weight.clone().requires_grad_()
    y = Grouped.apply(rows, leaf, ends)
    direction = random(90, 48, seed=2).bfloat16()
    y.backward(direction)
    assert (y.dtype, leaf.grad.dtype) == (torch.bfloat16, torch.float32)
    for e, (start, end) in enumerate([(0, 33), (33, 33), (33, 90)]):
        torch.testing.assert_close(
            y[start:end].double(), rows[start:end].double() @ weight[e].double().T, rtol=2e-2, atol=5e-2
        )
        exact = direction[start:end].double().T @ rows[start:end].double()
        torch.testing.assert_close(leaf.grad[e].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_to_the_experts_and_back(dtype: torch.dtype) -> None:
    chosen = routing(41, 5, 3)[1]
    order = chosen.flatten().argsort(stable=True)
    place = order.argsort().view(chosen.shape)
    there = results(lambda x: Dispatch.apply(x, order // 3, place), [random(41, 32)], dtype)
    expected = results(lambda x: x[order // 3], [random(41, 32)], torch.float64)
    inputs = [random(123, 32), random(41, 3, seed=1)]
    back = results(lambda x, w: Combine.apply(x, w.float(), place), inputs, dtype)
    expected += results(lambda x, w: (x[place] * w[..., None]).sum(1), inputs, torch.float64)
    for a, b in zip(there + back, expected, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradients(dtype: torch.dtype) -> None:
    targets = torch.randint(112, (700,), generator=torch.Generator().manual_seed(0))
    inputs = [random(700, 64), random(112, 64, seed=1) / 4]
    ours = results(lambda h, w: summed_cross_entropy(h, w, targets), inputs, dtype)
    exact = results(lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum"), inputs, torch.float64)
    for a, b in zip(ours, exact, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_shows_in_the_loss(bad: float) -> None:
    h, weight = random(20, 16), random(32, 16, seed=1)
    weight[7, 3] = bad
    assert not summed_cross_entropy(h.requires_grad_(), weight, torch.zeros(20, dtype=torch.long)).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_of_rows(dtype: torch.dtype) -> None:
    x = random(77, 48).to(dtype)
    x[3, 5] = torch.inf
    torch.testing.assert_close(squares(x), x.double().square().sum(-1).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added(dtype: torch.dtype) -> None:
    grad, rows, total = random(333, 1040).to(dtype), random(333, 160, seed=1).to(dtype), random(1040, 160, seed=2)
    exact = total.double() + grad.double().T @ rows.double()
    add_product(total, grad, rows)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)


def test_a_training_step_is_the_same_in_torch(
    make_model: Callable[..., Step35], make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    tokens = torch.from_numpy(make_batch().tokens)
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(library, "libraries", lambda: None)
        model = make_model()
        hidden = model.norm(model.trunk(tokens, Context.packed(tokens))).flatten(0, 1)
        summed_cross_entropy(hidden, model.lm_head.weight, tokens.flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=2e-4, atol=2e-4, msg=name)
