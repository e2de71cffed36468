"""The engine against full forward passes, and against itself under other batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.engine.blocks import BLOCK_TOKENS
from step35.engine.engine import Engine
from step35.engine.runner import Runner
from step35.engine.sampling import Scores
from step35.engine.scheduler import Rows
from step35.errors import ConfigError
from step35.model.step35 import Step35

pytestmark = pytest.mark.usefixtures("passes")

EOS = (1, 3)
PROMPTS = [[5], [6, 7, 8], list(range(4, 24)), [9, 9, 2, 9, 9, 2, 9], [0, 12]]
"""Shorter and longer than the model's window of 8."""


def generate(model: Step35, prompts: Sequence[Sequence[int]], params: Any, **options: Any) -> list[Completion]:
    engine = Engine(model, EOS, **options)
    return engine.generate(engine.create(prompts, params))


def assert_same(left: Sequence[Completion], right: Sequence[Completion]) -> None:
    assert [c.token_ids for c in left] == [c.token_ids for c in right]
    assert [c.finish_reason for c in left] == [c.finish_reason for c in right]
    for one, other in zip(left, right, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@torch.inference_mode()
def full_logprobs(model: Step35, prompt: Sequence[int], generated: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities (generated, V) of a pass over the whole sequence at once, without a cache."""
    logits = model(torch.tensor([[*prompt, *generated]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("speculate", [0, 3])
def test_decoding_with_a_cache_equals_full_forward_passes(model: Step35, speculate: int) -> None:
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, speculate=speculate)
    for prompt, completion in zip(PROMPTS, generate(model, PROMPTS, params), strict=True):
        expected = full_logprobs(model, prompt, completion.token_ids)
        assert len(completion.token_ids) == 30
        assert list(completion.token_ids) == expected.argmax(-1).tolist()
        assert completion.logprobs == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)


def test_sampled_logprobs_are_those_of_full_forward_passes(model: Step35) -> None:
    params = SamplingParams(max_tokens=30, temperature=0.7, ignore_eos=True, seed=4)
    for prompt, completion in zip(PROMPTS, generate(model, PROMPTS, params), strict=True):
        logits = full_logprobs(model, prompt, completion.token_ids) / 0.7
        chosen = torch.tensor(completion.token_ids)[:, None]
        assert completion.logprobs == pytest.approx(logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist(), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_what_its_prompts_give_one_by_one(model: Step35, temperature: float) -> None:
    many = [
        SamplingParams(max_tokens=8 + 5 * i, temperature=temperature, seed=i, ignore_eos=i % 2 == 0)
        for i in range(len(PROMPTS))
    ]
    together = generate(model, PROMPTS, many)
    alone = [generate(model, [prompt], [params])[0] for prompt, params in zip(PROMPTS, many, strict=True)]
    assert_same(together, alone)
    assert len({len(c.token_ids) for c in together}) > 1  # rows finished at different times


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("common", [0, 15, 16, 31, 50])
def test_a_shared_prefix_is_computed_once_and_changes_nothing(
    model: Step35, monkeypatch: pytest.MonkeyPatch, speculate: int, common: int
) -> None:
    prompts = [[n % 23 + 4 for n in range(common)] + [5 + other] * 20 for other in range(3)]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, speculate=speculate)
    expected = [generate(model, [prompt], params)[0] for prompt in prompts]
    computed = count_rows(monkeypatch)
    completions = generate(model, prompts, params)
    assert_same(completions, expected)
    shared = common // BLOCK_TOKENS * BLOCK_TOKENS
    assert [c.cached_tokens for c in completions] == [0, shared, shared]
    drafts = sum(sum(c.drafted) for c in completions)
    rows = sum(len(p) for p in prompts) - 2 * shared + sum(len(c.token_ids) for c in completions) - len(prompts)
    assert rows <= sum(computed) <= rows + (drafts + speculate * len(prompts)) * 2 * (speculate > 0)


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of tokens of each pass of the trunk."""
    run, computed = Runner.run, list[int]()

    def counting(self: Runner, rows: Sequence[Rows]) -> tuple[torch.Tensor, Scores]:
        computed.append(sum(r.count + r.depth for r in rows))
        return run(self, rows)

    monkeypatch.setattr(Runner, "run", counting)
    return computed


def test_a_request_that_was_ended_from_outside_brings_one_token_more(model: Step35) -> None:
    """As when the event loop of its reader has been closed: the engine learns of it in the next pass."""
    engine = Engine(model, EOS)
    [request] = engine.create([PROMPTS[2]], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    engine.add(request)
    engine.step()
    request.finish_reason = "cancelled"
    [(_, new)] = engine.step()
    assert new == request.generated[1:]
    assert len(new) == 1
    assert not engine.scheduler.running


def test_prompts_to_score_do_not_wait_for_each_other(model: Step35) -> None:
    """They compute their prefix themselves in any case."""
    engine = Engine(model, EOS)
    prompts = [[*PROMPTS[2] * 3, tail] for tail in range(4, 8)]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    engine.generate(engine.create(prompts, params))
    assert engine.counters["passes"] == 1


def test_more_prompts_than_max_batch_wait_for_a_place(model: Step35) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0)
    engine = Engine(model, EOS, max_batch=2)
    requests = engine.create(PROMPTS, params)
    most = max(len(engine.scheduler.running) for _ in engine.run(requests))
    assert most == 2
    assert_same([r.completion() for r in requests], generate(model, PROMPTS, params))


def test_no_prompts_give_no_completions(model: Step35) -> None:
    assert generate(model, [], SamplingParams()) == []


def test_generation_ends_at_stop_tokens_and_at_max_tokens(model: Step35) -> None:
    free = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    [whole] = generate(model, [PROMPTS[2]], free)
    stop = whole.token_ids[4]
    first = whole.token_ids.index(stop)
    cut = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    [stopped] = generate(model, [PROMPTS[2]], cut)
    assert stopped.token_ids == whole.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 20


def test_the_models_end_tokens_stop_unless_ignored(model: Step35) -> None:
    free = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    [whole] = generate(model, [PROMPTS[2]], free)
    engine = Engine(model, [whole.token_ids[2]])
    [stopped] = engine.generate(engine.create([PROMPTS[2]], SamplingParams(max_tokens=20, temperature=0.0)))
    [ignored] = engine.generate(engine.create([PROMPTS[2]], free))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[2]) + 1]
    assert ignored.token_ids == whole.token_ids


@pytest.mark.parametrize("speculate", [0, 3])
def test_generation_ends_where_the_context_does(model: Step35, speculate: int) -> None:
    params = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True, speculate=speculate)
    found = generate(model, PROMPTS[1:3], params, max_context=24)
    assert [len(c.token_ids) for c in found] == [24 - 3, 24 - 20]
    assert [c.finish_reason for c in found] == ["length", "length"]
    own_limit = model.config.max_position_embeddings
    assert Engine(model, EOS, max_context=10 * own_limit).max_context == own_limit


@pytest.mark.parametrize(
    "params", [SamplingParams(seed=11, max_tokens=16), SamplingParams(seed=11, top_p=0.9, max_tokens=16)]
)
def test_the_same_seed_gives_the_same_tokens_in_any_batch(model: Step35, params: SamplingParams) -> None:
    prompt = PROMPTS[3]
    [alone] = generate(model, [prompt], params)
    others = [SamplingParams(seed=i, top_k=5, max_tokens=3 * i + 1) for i in range(4)]
    first = generate(model, [prompt, *PROMPTS[:4]], [params, *others])[0]
    last = generate(model, [*PROMPTS[:4], prompt], [*others, params])[-1]
    assert_same([first, last], [alone, alone])
    seeded_otherwise = SamplingParams(seed=12, max_tokens=16)
    assert generate(model, [prompt], seeded_otherwise)[0].token_ids != alone.token_ids


def test_without_a_seed_each_call_draws_its_own(model: Step35) -> None:
    params = SamplingParams(max_tokens=40, temperature=2.0, ignore_eos=True)
    one, other = generate(model, [PROMPTS[0]] * 2, params)
    assert one.token_ids != other.token_ids


def test_completions_carry_the_weights_version(model: Step35) -> None:
    engine = Engine(model, EOS)
    engine.version = 7
    [completion] = engine.generate(engine.create([[5]], SamplingParams(max_tokens=1)))
    assert completion.version == 7


def test_an_empty_prompt_is_refused(model: Step35) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        Engine(model, EOS).create([[5], []], SamplingParams())


def test_a_prompt_that_leaves_no_room_is_refused(model: Step35) -> None:
    engine = Engine(model, EOS, max_context=8)
    engine.create([[5] * 7], SamplingParams())
    with pytest.raises(ValueError, match=r"8 tokens.*holds 8"):
        engine.create([[5] * 8], SamplingParams())


def test_more_drafts_than_modules_are_refused(model: Step35) -> None:
    with pytest.raises(ConfigError, match=r"speculate=4.*3 MTP modules.*0 to 3"):
        Engine(model, EOS).create([[5]], SamplingParams(speculate=4))


def test_parameters_must_match_the_prompts(model: Step35) -> None:
    with pytest.raises(ValueError):
        Engine(model, EOS).create([[5], [6]], [SamplingParams()])
