from __future__ import annotations

from collections.abc import Callable

import pytest

from step35.api.sampling import SamplingParams
from step35.engine import runner
from step35.engine.engine import Engine
from step35.engine.graphs import Shape
from step35.engine.scheduler import Rows
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
