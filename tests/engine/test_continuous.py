"""Whatever the batch, the chunks, the shared prefixes and the preemptions: tokens are those of full passes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from step35.api.sampling import SamplingParams
from step35.config.cost import cost
from step35.engine.engine import Engine
from step35.engine.request import Request
from step35.model.step35 import Step35

CONTEXT = 90
PROMPTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=6
)

pytestmark = pytest.mark.usefixtures("passes")
"""Which document a prompt begins with, for how long, and how many tokens of its own and drafts a pass it has."""


def prompt(document: int, common: int, own: int) -> list[int]:
    numbers = random.Random(document)
    return [numbers.randrange(4, 29) for _ in range(common)] + [4 + (own * n) % 25 for n in range(own)]


def run(engine: Engine, requests: Sequence[Request], arrivals: Sequence[int]) -> None:
    """Add each request at its own pass, then run all to their ends."""
    queue = sorted(zip(arrivals, range(len(requests)), strict=True))
    passes = 0
    while queue or engine.busy:
        while queue and queue[0][0] <= passes:
            engine.add(requests[queue.pop(0)[1]])
        engine.step()
        passes += 1


@torch.inference_mode()
def assert_as_full_passes(model: Step35, request: Request) -> None:
    logits = model(torch.tensor([request.tokens])).logits[0, len(request.prompt) - 1 : -1]
    assert request.generated == logits.argmax(-1).tolist()
    assert request.raw_logprobs == pytest.approx(logits.log_softmax(-1).max(-1).values.tolist(), abs=1e-4)


def assert_nothing_is_held(engine: Engine) -> None:
    assert sum(engine.cache.full.holders) == sum(engine.cache.window.holders) == 0
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting


@settings(max_examples=40, deadline=None)
@given(
    prompts=PROMPTS,
    arrivals=st.lists(st.integers(0, 12), min_size=6, max_size=6),
    max_batch=st.integers(1, 5),
    chunk=st.integers(1, 40),
    spare=st.integers(0, 80),
    adaptive=st.booleans(),
)
def test_any_mix_equals_full_passes(model: Step35, prompts: Any, arrivals: list[int], **options: Any) -> None:
    engine = Engine(
        model, (1, 3), max_batch=options["max_batch"], max_context=CONTEXT, cache_tokens=CONTEXT + 4 + options["spare"],
        max_pass_tokens=options["chunk"], adaptive_depth=options["adaptive"],
    )  # fmt: skip
    requests: list[Request] = []
    for *what, depth in prompts:
        params = SamplingParams(max_tokens=14, temperature=0, ignore_eos=True, speculate=depth)
        requests += engine.create([prompt(*what)], params)
    run(engine, requests, arrivals[: len(requests)])
    for request in requests:
        assert_as_full_passes(model, request)
    assert_nothing_is_held(engine)


def test_too_few_blocks_preempt_the_request_that_came_last(model: Step35) -> None:
    engine = Engine(model, (1, 3), max_context=CONTEXT, cache_tokens=CONTEXT + 4)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    requests = engine.create([prompt(n, 20, 3) for n in range(3)], params)
    ended: list[Request] = []
    for _ in engine.run(requests):
        ended += [r for r in requests if r.finish_reason and r not in ended]
    assert engine.scheduler.preemptions > 0
    assert ended == requests
    for request in requests:
        assert_as_full_passes(model, request)


def test_a_later_turn_finds_the_earlier_ones(model: Step35) -> None:
    engine = Engine(model, (1, 3), max_context=CONTEXT)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, speculate=2)
    [first] = engine.create([prompt(0, 40, 2)], params)
    engine.generate([first])
    [second] = engine.create([[*first.tokens, 7, 8, 9]], params)
    engine.generate([second])
    assert second.cached >= len(first.tokens) // 16 * 16 - 16
    assert_as_full_passes(model, second)


def test_sliding_blocks_are_given_back_behind_the_window(model: Step35) -> None:
    engine = Engine(model, (1, 3), max_context=600)
    params = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True, speculate=3)
    [request] = engine.create([[5, 6]], params)
    held = 0
    for _ in engine.run([request]):
        held = max(held, sum(block >= 0 for block in request.window))
        if request.full:
            assert len(request.full) * 16 <= request.length + 16 + 4
    assert held <= 3  # a window of 8 tokens, drafts and what the modules have not read lie in three blocks of 16


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_storm_of_cancellations_leaks_nothing(model: Step35, seed: int) -> None:
    numbers = random.Random(seed)
    engine = Engine(model, (1, 3), max_batch=3, max_context=CONTEXT, cache_tokens=150, max_pass_tokens=24)
    alive: list[Request] = []
    for _ in range(40):
        if numbers.random() < 0.5:
            params = SamplingParams(max_tokens=numbers.randrange(1, 20), seed=1, speculate=numbers.randrange(4))
            [request] = engine.create([prompt(numbers.randrange(3), numbers.randrange(50), 5)], params)
            engine.add(request)
            alive.append(request)
        if alive and numbers.random() < 0.3:
            engine.cancel(alive.pop(numbers.randrange(len(alive))))
        engine.step()
    for request in alive:
        engine.cancel(request)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("in_flight", ["continue", "finish"])
def test_new_weights_while_requests_run(model: Step35, build_model: Any, in_flight: Any) -> None:
    mine = build_model(seed=0)
    engine = Engine(mine, (1, 3), max_context=CONTEXT)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    [early] = engine.create([prompt(0, 20, 3)], params)
    engine.add(early)
    for _ in range(5):
        engine.step()
    engine.update_weights(build_model(seed=1).state_dict(), 7, in_flight)
    [late] = engine.create([prompt(0, 20, 3)], params)
    run(engine, [late], [0])
    assert late.versions == [7] * 12
    assert late.cached == 0  # what the old weights computed is not found
    assert_as_full_passes(mine, late)
    assert early.versions == ([0] * 5 + [7] * 7 if in_flight == "continue" else [0] * 12)
    if in_flight == "finish":
        assert_as_full_passes(model, early)


@pytest.mark.parametrize("length", [5, 40, 200])
def test_memory_follows_the_cost_model(model: Step35, length: int) -> None:
    engine = Engine(model, (1, 3), max_context=300)
    [request] = engine.create([prompt(0, length, 1)], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    engine.add(request)
    engine.step()
    predicted = cost(model.config, request.computed, cache_bytes=4).cache_bytes
    rounding = 16 * engine.cache.token_bytes["full"] + 2 * 16 * engine.cache.token_bytes["window"]
    assert predicted <= engine.cache.bytes_held(request) <= predicted + rounding
