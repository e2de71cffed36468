from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from step35.api.sampling import SamplingParams
from step35.engine import paged_context, runner
from step35.engine.engine import Engine
from step35.engine.graphs import Shape
from step35.engine.scheduler import Rows
from step35.model import attention_flex
from step35.model.attention_flex import attend_flex
from step35.model.step35 import Step35


@pytest.fixture
def engine(build_model: Callable[..., Step35], monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that runs what a GPU would capture. That it is right, the other tests of the engine show as well."""
    monkeypatch.setattr(runner.Program, "create", lambda *_: None)
    monkeypatch.setattr(runner.Runner, "graphs_on", ("cpu",))
    return Engine(build_model(seed=0), ())


def test_few_graphs_serve_every_pass(engine: Engine) -> None:
    prompts = [[n % 29, 2, 5, 7][: 1 + n % 4] for n in range(21)]
    engine.generate(engine.create(prompts, SamplingParams(max_tokens=60, temperature=1.0, seed=1, speculate=2)))
    assert engine.runner.graphs is not None
    shapes: dict[str, set[Shape]] = {}
    for name, shape in engine.runner.graphs._graphs:
        shapes.setdefault(name, set()).add(shape)
    assert shapes.keys() == {"trunk", "module 0", "module 1"}
    assert engine.counters["passes"] > 40
    for found in shapes.values():
        assert {s.requests for s in found} <= {1, 2, 4, 8, 16, 32}
        assert {s.rows for s in found} <= {1, 2, 4}
        assert {s.slots for s in found} == {256}


def test_shapes_are_rounded_up(engine: Engine) -> None:
    (request,) = engine.create([[1, 2, 3]], SamplingParams())
    assert Shape.holding([Rows(request, 250, 3)] * 5, 1) == Shape(requests=8, rows=4, slots=256, first=1)
    assert Shape.holding([Rows(request, 255, 2)], 0) == Shape(requests=1, rows=2, slots=512, first=0)


def test_nothing_is_written_outside_the_requests_own_slots(engine: Engine) -> None:
    for store in (*engine.cache.keys, *engine.cache.values, *engine.cache.hidden):
        store.fill_(7.0)
    (request,) = engine.create([[1, 2, 3]], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, speculate=1))
    engine.add(request)
    held = set[int]()
    while request.finish_reason is None:
        engine.step()
        held |= set(request.window)
    slots = engine.cache.spare["window"]
    untouched = [slot for slot in range(slots) if slot // 16 not in held]
    assert untouched
    assert all((store[untouched] == 7.0).all() for store in engine.cache.hidden)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_prompts_through_flex_attention_give_the_same(
    build_model: Callable[..., Step35], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.Program, "create", lambda *_: None)
    monkeypatch.setattr(paged_context, "fits", lambda _: False)
    calls = list[int]()

    def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        calls.append(q.shape[1])
        return attend_flex(q, k, v, mask)

    monkeypatch.setattr(paged_context, "attend_flex", flex)
    monkeypatch.setattr(attention_flex, "_kernel", lambda: flex_attention)  # uncompiled
    prompts = [[(7 * n + m) % 29 for n in range(170 + m)] for m in range(2)]
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0, speculate=1)
    logprobs = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(paged_context.PagedContext, "flex_on", devices)
        engine = Engine(build_model(seed=0), (), max_pass_tokens=300)  # the second prompt comes in two chunks
        logprobs.append([c.prompt_logprobs for c in engine.generate(engine.create(prompts, params))])
    assert {170, 130} <= set(calls)
    for plain, found in zip(*logprobs, strict=True):
        assert found == pytest.approx(plain, rel=1e-4, abs=1e-4)
