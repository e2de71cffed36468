"""The model on a CUDA device gives the CPU's numbers. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from step35.api.sampling import SamplingParams
from step35.engine.engine import Engine
from step35.model import attention_kernels as kernels
from step35.model.context import Context
from step35.model.step35 import Step35
from step35.model.weights import load_model
from step35.train.loss import summed_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Make = Callable[..., Step35]


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["tiny-a", "tiny-b"])
def test_logits_equal_the_stored_ones(name: str, golden: Path) -> None:
    model = load_model(golden / name, device="cuda")
    cases = np.load(golden / name / "cases.npz")
    for i in range(int(cases["n"])):
        ids = torch.from_numpy(cases[f"ids{i}"]).long().cuda()
        with torch.no_grad():
            output = model(ids[None], mtp=True)
        expected = torch.from_numpy(cases[f"logits{i}"])
        assert (output.logits[0].cpu() - expected).norm() / expected.norm() < 1e-4
        for k, logits in enumerate(output.mtp_logits):
            expected = torch.from_numpy(cases[f"mtp{i}_{k}"])
            assert (logits[0, : len(expected)].cpu() - expected).norm() / expected.norm() < 1e-4


def gradients(model: Step35, tokens: torch.Tensor, segments: torch.Tensor) -> dict[str, torch.Tensor]:
    h_BTD = model.norm(model.trunk(tokens, Context.packed(tokens, segments)))
    summed_cross_entropy(h_BTD[:, :-1].flatten(0, 1), model.lm_head.weight, tokens[:, 1:].flatten()).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_packed_documents_equal_those_of_the_cpu(make_model: Make) -> None:
    tokens = torch.randint(0, 97, (2, 300), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(300) // 110).expand(2, -1).contiguous()
    expected = gradients(make_model(), tokens, segments)
    found = gradients(make_model().cuda(), tokens.cuda(), segments.cuda())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1000, 1024, 90])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("documents", [1, 2])
def test_attention_equals_the_reference(
    dtype: torch.dtype, tokens: int, window: int | None, documents: int, make_model: Make
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = replace(make_model().config.layer(0), heads=8, kv_heads=2, head_dim=64, window=window)
    segments = (torch.arange(tokens, device="cuda")[None] > 0.6 * tokens).long() * (documents - 1)
    context = Context.packed(segments, segments)
    seen = kernels.visible(context.positions_BT, context.positions_BT, window)
    seen = seen & kernels.same_document(segments, segments)
    results = []
    for path in (partial(context.attend, layer), partial(kernels.attend, mask_BTS=seen)):
        q, k, v = (
            torch.randn(1, tokens, h, 64, generator=generator.manual_seed(h + i)).cuda().to(dtype).requires_grad_()
            for i, h in enumerate((8, 2, 2))
        )
        y = path(q, k, v)
        results.append([y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_attention_takes_the_fused_kernels() -> None:
    one, two = (torch.arange(600, device="cuda")[None] // size for size in (600, 500))
    assert Context.packed(one, one)._path(None) == "documents"
    assert Context.packed(one, one)._path(128) == Context.packed(two, two)._path(None) == "flex"


def test_bf16_grouped_experts_equal_one_at_a_time(make_model: Make) -> None:
    experts = make_model(hidden_size=64, moe_intermediate_size=32).layers[2].moe.experts.cuda().bfloat16()
    x_ND = torch.randn(200, 64, device="cuda", dtype=torch.bfloat16)
    weights_NK = torch.rand(200, 2, device="cuda")
    chosen_NK = torch.rand(200, 4, device="cuda").topk(2).indices
    with torch.no_grad():
        found, expected = (path(x_ND, weights_NK, chosen_NK) for path in (experts.grouped, experts.reference))
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 9])
def test_speculative_output_equals_plain(make_model: Make, dtype: torch.dtype, count: int) -> None:
    model = make_model().cuda().to(dtype).eval()
    engine = Engine(model, ())
    prompts = [[n, 2, 3, 4, 5][: 1 + n % 5] for n in range(1, 1 + count)]
    outputs = []
    for depth in (0, 2):
        params = SamplingParams(max_tokens=24, temperature=0, speculate=depth)
        outputs.append([c.token_ids for c in engine.generate(engine.create(prompts, params))])
    assert engine.runner.graphs is not None
    assert all(graph._captured is not None for graph in engine.runner.graphs._graphs.values())
    assert all(len(ids) == 24 for ids in outputs[1])
    if dtype == torch.bfloat16:  # other shapes round differently, and near ties may be broken otherwise
        return
    assert outputs[0] == outputs[1]
    engine.runner.graphs = None
    plain = engine.generate(engine.create(prompts, SamplingParams(max_tokens=24, temperature=0)))
    assert [c.token_ids for c in plain] == outputs[0]


def test_long_prompts_score_as_on_the_cpu(make_model: Make) -> None:
    prompts = [[(7 * n + m) % 97 for n in range(300 + m)] for m in range(2)]
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0)
    scores = []
    for device in ("cpu", "cuda"):
        model = make_model(max_position_embeddings=1024).to(device).eval()
        engine = Engine(model, (), max_pass_tokens=500)  # the second prompt comes in two chunks
        scores.append([c.prompt_logprobs for c in engine.generate(engine.create(prompts, params))])
    for expected, found in zip(*scores, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
