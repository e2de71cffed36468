"""Speculation changes the number of passes and nothing else; drafts come from caches that are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.engine.engine import Engine
from step35.engine.paged_context import slot
from step35.engine.request import Request
from step35.engine.runner import Runner
from step35.engine.sampling import Scores
from step35.engine.scheduler import Rows
from step35.errors import ConfigError
from step35.model.context import Context
from step35.model.step35 import Step35

pytestmark = pytest.mark.usefixtures("passes")

EOS = (1, 3)
PROMPTS = [[5], [6, 7, 8], list(range(4, 24)), [9, 9, 2, 9, 9, 2, 9], [0, 12], [9, 9, 2, 9, 4]]
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def models(build_model: Callable[..., Step35]) -> list[Step35]:
    return [build_model(seed) for seed in SEEDS]


def generate(model: Step35, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
    engine = Engine(model, EOS)
    return engine.generate(engine.create(prompts, params))


def settings_for(depths: Sequence[int], temperature: float, **more: Any) -> list[SamplingParams]:
    """Return one setting a prompt, with lengths of their own, so that rows finish at different times."""
    return [
        SamplingParams(max_tokens=7 + 6 * i, temperature=temperature, seed=i, speculate=depth, **more)
        for i, depth in enumerate(depths)
    ]


def assert_same_output(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_speculative_output_is_plain_output(models: list[Step35], depth: int, temperature: float) -> None:
    accepted = [0] * depth
    for model in models:
        found = generate(model, PROMPTS, settings_for([depth] * 6, temperature))
        assert_same_output(found, generate(model, PROMPTS, settings_for([0] * 6, temperature)))
        accepted = [n + sum(c.accepted[k] for c in found) for k, n in enumerate(accepted)]
    assert min(accepted) > 0  # or the test would show nothing about accepted drafts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_with_and_without_drafts_share_a_batch(models: list[Step35], temperature: float) -> None:
    depths = [3, 0, 1, 2, 3, 0]
    found = generate(models[1], PROMPTS, settings_for(depths, temperature))
    assert_same_output(found, generate(models[1], PROMPTS, settings_for([0] * 6, temperature)))
    assert [len(c.drafted) for c in found] == depths
    assert [len(c.accepted) for c in found] == depths


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_speculative_output_is_plain_output_for_any_batch(models: list[Step35], data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(models))
    prompts = data.draw(st.lists(st.lists(st.integers(0, 28), min_size=1, max_size=18), min_size=1, max_size=4))
    plain = [
        SamplingParams(
            max_tokens=data.draw(st.integers(1, 25)),
            temperature=data.draw(st.sampled_from([0.0, 0.6, 1.0])),
            top_k=data.draw(st.sampled_from([0, 0, 4])),
            seed=data.draw(st.integers(0, 1000)),
            stop_token_ids=tuple(data.draw(st.lists(st.integers(0, 28), max_size=1))),
        )
        for _ in prompts
    ]
    drafting = [SamplingParams(**{**vars(p), "speculate": data.draw(st.integers(0, 3))}) for p in plain]
    assert_same_output(generate(model, prompts, drafting), generate(model, prompts, plain))


@torch.inference_mode()
def teacher_forced(model: Step35, known: list[int], depth: int) -> tuple[list[int], list[torch.Tensor]]:
    """Draft from scratch: no cache, every module over the whole prefix, one more token a module.

    Returns the drafts, and each module's states (T-1, D) at the positions whose trunk state is known: all but that
    of the newest token, which nothing has read yet.
    """
    tokens, states = list(known), []
    trunk_BTD = model.trunk(torch.tensor([known]), Context.packed(torch.tensor([known])))
    for k in range(depth):
        tokens_BT = torch.tensor([tokens])
        h_BTD = F.pad(trunk_BTD, (0, 0, 0, k))  # no row that counts sees the padding
        states.append(model.mtp_states(tokens_BT, h_BTD, Context.packed(tokens_BT), k + 1)[k][0, : len(known) - 1])
        tokens.append(int(model.mtp[k].logits(states[k][-1:]).argmax()))
    return tokens[len(known) :], states


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_are_those_of_passes_over_the_whole_prefix(
    models: list[Step35], monkeypatch: pytest.MonkeyPatch, depth: int, temperature: float
) -> None:
    run, most_accepted = Runner.run, 0

    def checked(self: Runner, planned: list[Rows]) -> tuple[torch.Tensor, Scores]:
        nonlocal most_accepted
        result = run(self, planned)
        for request in [rows.request for rows in planned if rows.depth]:
            expected, states = teacher_forced(self.model, request.tokens, depth)
            assert request.drafts == expected
            for k, (hidden, state_TD) in enumerate(zip(self.cache.hidden[1 : 1 + depth], states, strict=True)):
                # What lies behind the window has been given back.
                last = range(max(0, len(state_TD) - 8), len(state_TD))
                rows = Rows(request, 0, request.length)
                slots = [slot(rows, t + 1 + k, "window") for t in last]
                torch.testing.assert_close(hidden[slots], state_TD[list(last)], atol=1e-3, rtol=1e-3)
            most_accepted = max(most_accepted, request.length - known.get(request, request.length))
            known[request] = request.length
        return result

    known: dict[Request, int] = {}
    monkeypatch.setattr(Runner, "run", checked)
    prompts = [[*PROMPTS[2][:9], *tail] for tail in PROMPTS[:4]]
    for model in models[1:]:
        generate(model, prompts, settings_for([depth] * 4, temperature, ignore_eos=True))
        generate(model, prompts[:1], [SamplingParams(max_tokens=30, temperature=temperature, seed=1, speculate=depth)])
    assert most_accepted == depth + 1  # the widest window was needed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_are_counted_by_depth(models: list[Step35], monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    offered: list[list[int]] = []
    run = Runner.run

    def recording(self: Runner, planned: list[Rows]) -> tuple[torch.Tensor, Scores]:
        result = run(self, planned)
        offered.extend(list(rows.request.drafts) for rows in planned if rows.depth)
        return result

    monkeypatch.setattr(Runner, "run", recording)
    engine = Engine(models[1], EOS)
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=3, ignore_eos=True, speculate=3)
    [request] = engine.create([PROMPTS[1]], params)
    passes = [new for [(_, new)] in engine.run([request])]
    drafted, accepted = [0, 0, 0], [0, 0, 0]
    for drafts, new in zip(offered, passes[1:], strict=True):
        judged = new if new is not passes[-1] else new[:-1]  # the last token of all ends the request instead
        for place, (wanted, token) in enumerate(zip(drafts, judged, strict=False)):
            drafted[place] += 1
            accepted[place] += wanted == token
    completion = request.completion()
    assert completion.drafted == tuple(drafted)
    assert completion.accepted == tuple(accepted)
    assert drafted[0] > accepted[0] > 0
    assert sum(map(len, passes)) == 40
    assert len(passes) < 40  # or speculation would save nothing


def test_drafts_are_chosen_within_the_draft_vocabulary(models: list[Step35], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the likeliest of its tokens, and what is generated stays the same."""
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, speculate=3)
    run, within = Runner.run, 0

    def checked(self: Runner, planned: list[Rows]) -> tuple[torch.Tensor, Scores]:
        nonlocal within
        result = run(self, planned)
        for request in [rows.request for rows in planned if rows.depth]:
            with torch.inference_mode():
                _, states = teacher_forced(self.model, request.tokens, 1)
                logits_V = self.model.mtp[0].logits(states[0][-1])
            assert request.drafts[0] == int(logits_V[:10].argmax())
            assert max(request.drafts) < 10
            within += int(logits_V.argmax()) < 10
        return result

    [expected] = Engine(models[1], EOS).generate(Engine(models[1], EOS).create([PROMPTS[1]], params))
    monkeypatch.setattr(Runner, "run", checked)
    engine = Engine(models[1], EOS, draft_vocabulary=10)
    [completion] = engine.generate(engine.create([PROMPTS[1]], params))
    assert completion.token_ids == expected.token_ids
    assert 0 < within < engine.counters["passes"] - 1  # it mattered


@pytest.mark.parametrize("number", [0, 10**6])
def test_an_impossible_draft_vocabulary_is_refused(models: list[Step35], number: int) -> None:
    with pytest.raises(ConfigError, match=f"draft_vocabulary={number} is not allowed; give a number"):
        Engine(models[0], EOS, draft_vocabulary=number)


def test_plain_decoding_counts_no_drafts(models: list[Step35]) -> None:
    [completion] = generate(models[0], [[5]], [SamplingParams(max_tokens=3, temperature=0.0)])
    assert completion.drafted == completion.accepted == ()
