"""Adaptive depth follows acceptance and times, and comes back from no drafts at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from step35.api.sampling import SamplingParams
from step35.engine.engine import Engine
from step35.engine.request import Request
from step35.engine.speculative import PROBE_EVERY, RECENT, TRIALS, DepthControl
from step35.model.step35 import Step35

MODULES = 3


def play(control: DepthControl, passes: int, *, cost: float, right: int, requests: int = 1) -> Counter[int]:
    """Run passes in which each draft costs `cost` plain passes and the first `right` drafts are right; count depths."""
    depths: Counter[int] = Counter()
    for _ in range(passes):
        depth = control.choose(requests, MODULES)
        depths[depth] += 1
        control.time(requests, depth, 0.01 * (1 + depth * cost))
        for _ in range(requests):
            control.observe(depth, min(depth, right))
    return depths


def usual(depths: Counter[int]) -> int:
    return depths.most_common(1)[0][0]


@pytest.mark.parametrize(
    ("cost", "right", "best"), [(0.2, 3, 3), (0.2, 1, 1), (0.2, 0, 0), (0.9, 3, 3), (1.1, 3, 0), (0.5, 2, 2)]
)
def test_the_depth_is_the_fastest(cost: float, right: int, best: int) -> None:
    control = DepthControl(MODULES)
    play(control, 400, cost=cost, right=right)  # acceptance has to be learned
    settled = play(control, 10 * PROBE_EVERY, cost=cost, right=right)
    assert settled[best] >= 9 * PROBE_EVERY
    assert set(settled) <= {best - 1, best, best + 1}


def test_every_depth_is_tried_first_and_loads_are_told_apart() -> None:
    control = DepthControl(MODULES)
    assert play(control, TRIALS * (MODULES + 1), cost=0.1, right=3) == dict.fromkeys(range(MODULES + 1), TRIALS)
    play(control, 40, cost=1.5, right=3, requests=16)
    assert usual(play(control, 32, cost=1.5, right=3, requests=16)) == 0
    assert usual(play(control, 32, cost=0.1, right=3)) == 3


def test_a_change_is_found_out_and_one_slow_pass_is_none() -> None:
    control = DepthControl(MODULES)
    play(control, 200, cost=0.1, right=3)
    control.time(1, 3, 60.0)
    assert control.choose(1, MODULES) == 3
    play(control, 20 * PROBE_EVERY, cost=2.0, right=3)
    assert usual(play(control, 64, cost=2.0, right=3)) == 0
    play(control, 2 * PROBE_EVERY * RECENT * MODULES, cost=0.1, right=3)
    assert usual(play(control, 64, cost=0.1, right=3)) == 3


def test_no_request_drafts_deeper_than_it_may() -> None:
    control = DepthControl(MODULES)
    for _ in range(5 * PROBE_EVERY):
        depth = control.choose(1, 1)
        assert depth <= 1
        control.time(1, depth, 0.01)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_requests_draft_again_after_passes_without_drafts(
    build_model: Callable[..., Step35], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    wanted = [0, 0, 3, 1, 0, 2] * 20
    depths, offered, take = iter(wanted), list[int](), Engine._take

    def recording(self: Engine, request: Request, *choice: Any) -> int:
        offered.append(len(request.drafts))
        return take(self, request, *choice)

    model, prompt = build_model(1), [6, 7, 8]
    params = SamplingParams(max_tokens=50, temperature=temperature, seed=3, ignore_eos=True, speculate=3)
    plain, adaptive = Engine(model, (1, 3)), Engine(model, (1, 3), adaptive_depth=True)
    expected = plain.generate(plain.create([prompt], replace(params, speculate=0)))
    monkeypatch.setattr(Engine, "_take", recording)
    monkeypatch.setattr(DepthControl, "choose", lambda self, requests, most: next(depths))
    found = adaptive.generate(adaptive.create([prompt], params))
    assert found[0].token_ids == expected[0].token_ids
    assert offered[1:] == wanted[: len(offered) - 1]  # the first pass reads the prompt
    assert sum(found[0].accepted) > 0
