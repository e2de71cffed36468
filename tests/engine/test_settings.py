"""Penalties, cuts, stop texts and log-probabilities: each against what it says, computed the slow way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.engine.engine import Engine
from step35.engine.llm import LLM
from step35.engine.sampling import Place, adjust, choose
from step35.errors import ConfigError
from step35.model.step35 import Step35

PROMPT = [6, 7, 8, 7]


def generate(model: Step35, **settings: Any) -> Completion:
    engine = Engine(model, (1, 3))
    params = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, "ignore_eos": True} | settings)
    return engine.generate(engine.create([PROMPT], params))[0]


@torch.inference_mode()
def raw_logits(model: Step35, completion: Completion) -> torch.Tensor:
    """Return the logits (T, V) behind each generated token, from a pass over all."""
    return model(torch.tensor([[*PROMPT, *completion.token_ids]])).logits[0, len(PROMPT) - 1 : -1]


def penalised(logits: list[float], answer: list[int], params: SamplingParams) -> list[float]:
    """Return the logits of one place after penalties and bias, token by token."""
    out = []
    for token, logit in enumerate(logits):
        if token in PROMPT or token in answer:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * answer.count(token) + params.presence_penalty * (token in answer)
        out.append(logit + params.logit_bias.get(token, 0.0))
    return out


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.6},
        {"presence_penalty": 3.0},
        {"frequency_penalty": 1.5},
        {"logit_bias": {11: 20.0, 12: -5.0}},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": -0.5, "logit_bias": {4: 3.0}},
    ],
)
def test_penalties_and_bias_are_those_of_the_formula(model: Step35, settings: Any, speculate: int) -> None:
    completion = generate(model, speculate=speculate, **settings)
    params = SamplingParams(**settings)
    for place, logits in enumerate(raw_logits(model, completion).tolist()):
        adjusted = torch.tensor(penalised(logits, list(completion.token_ids[:place]), params))
        assert completion.token_ids[place] == int(adjusted.argmax())
        assert completion.logprobs[place] == pytest.approx(float(adjusted.log_softmax(-1).max()), abs=1e-3)
        raw = torch.tensor(logits).log_softmax(-1)[completion.token_ids[place]]
        assert completion.raw_logprobs[place] == pytest.approx(float(raw), abs=1e-3)


def test_penalties_change_the_answer(model: Step35) -> None:
    plain = generate(model).token_ids
    assert len(set(generate(model, presence_penalty=30.0).token_ids)) > len(set(plain))


def test_min_p_keeps_what_reaches_its_share_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, -1.0, -2.0, -3.0]])
    uniforms = [n / 100 for n in range(100)]
    params = [SamplingParams(min_p=0.3)] * 100
    tokens, logprobs = choose(logits.expand(100, -1), params, uniforms)
    assert set(tokens.tolist()) == {0, 1}  # e^-1 = 0.37 of the likeliest, e^-2 = 0.14
    assert float(logprobs[0].exp()[:2].sum()) == pytest.approx(1)


def test_a_mask_leaves_only_what_is_allowed_whatever_the_bias() -> None:
    allowed = torch.tensor([False, True, False])
    place = Place(SamplingParams(logit_bias={0: 50.0}), 0.5, allowed=allowed)
    adjusted = adjust(torch.tensor([[3.0, -4.0, 2.0]]), [place])
    assert adjusted.tolist() == [[float("-inf"), -4.0, float("-inf")]]


@pytest.mark.parametrize("speculate", [0, 2])
def test_likeliest_tokens_of_the_raw_and_of_the_processed_distribution(model: Step35, speculate: int) -> None:
    for kind in ("raw", "processed"):
        settings = {"temperature": 0.5, "seed": 3, "top_logprobs": 4, "logprobs_of": kind, "speculate": speculate}
        completion = generate(model, **settings)
        scale = 1.0 if kind == "raw" else 2.0
        expected = (raw_logits(model, completion) * scale).log_softmax(-1).topk(4)
        assert len(completion.top_logprobs) == len(completion.token_ids)
        for place, top in enumerate(completion.top_logprobs):
            assert [token for token, _ in top] == expected.indices[place].tolist()
            assert [value for _, value in top] == pytest.approx(expected.values[place].tolist(), abs=1e-3)


@pytest.mark.parametrize("chunk", [3, 512])
def test_prompt_logprobs_are_those_of_score(model: Step35, chunk: int) -> None:
    engine = Engine(model, (1, 3), max_pass_tokens=chunk)
    prompt = [5 + n % 20 for n in range(40)]
    params = SamplingParams(max_tokens=2, prompt_logprobs=3, temperature=0)
    for _ in range(2):  # the second time, the prefix is known, and must be read again all the same
        [completion] = engine.generate(engine.create([prompt], params))
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        own = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert completion.prompt_logprobs == pytest.approx(own.tolist(), abs=1e-4)
        likeliest = expected.topk(3)
        assert len(completion.prompt_top_logprobs) == len(prompt) - 1
        for place, top in enumerate(completion.prompt_top_logprobs):
            assert [token for token, _ in top] == likeliest.indices[place].tolist()
            assert [value for _, value in top] == pytest.approx(likeliest.values[place].tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def llm(build_model: Callable[..., Step35]) -> LLM:
    tokenizer: Tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 5, 300)
    return LLM(model=build_model(seed=3, vocab=tokenizer.vocab_size), tokenizer=tokenizer)


@pytest.mark.parametrize("speculate", [0, 3])
def test_generation_ends_before_a_stop_text(llm: LLM, speculate: int) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=5, ignore_eos=True)
    [whole] = llm.generate(["the"], params)
    stop = whole.text[10:13]
    settings = {**vars(params), "stop": (stop, "never there"), "speculate": speculate}
    [stopped] = llm.generate(["the"], SamplingParams(**settings))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]


def test_a_stop_text_that_never_comes_changes_nothing(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=6, ignore_eos=True)
    [whole] = llm.generate(["the"], params)
    [same] = llm.generate(["the"], SamplingParams(**{**vars(params), "stop": ("zebra",)}))
    assert (same.text, same.token_ids, same.finish_reason) == (whole.text, whole.token_ids, "length")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_logprobs": True}, "prompt_logprobs=True is not allowed; give an integer"),
        ({"min_p": 1.5}, r"min_p=1.5 is not allowed; give a number in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"stop": ("",)}, "texts that are not empty"),
        ({"logit_bias": {99: 1.0}}, "token id 99 is outside the vocabulary; give ids from 0 to 28"),
        ({"stop": ("x",)}, "need a tokenizer"),
    ],
)
def test_bad_settings_are_refused(model: Step35, settings: Any, message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        generate(model, **settings)


def test_a_cache_too_small_for_one_request_is_refused(model: Step35) -> None:
    with pytest.raises(ConfigError, match="cache_tokens=10 holds no request of max_context=64 tokens; give at least"):
        Engine(model, (1, 3), max_context=64, cache_tokens=10)
