"""`LLM`: text in and out around the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from step35.agents.tools.calculator import Calculator
from step35.api.sampler import Completion, Sampler
from step35.api.sampling import SamplingParams
from step35.data import chat
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.engine.engine import News
from step35.engine.llm import LLM
from step35.engine.request import Request
from step35.errors import ConfigError
from step35.model.step35 import Step35
from step35.model.weights import save_model

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog", "日本語 and émigré", "12 + 34 = 46"], 300)


@pytest.fixture
def llm(build_model: Callable[..., Step35], tokenizer: Tokenizer) -> LLM:
    return LLM(model=build_model(0, tokenizer.vocab_size), tokenizer=tokenizer)


def test_text_prompts_are_encoded_behind_the_bos_token(llm: LLM, tokenizer: Tokenizer) -> None:
    sampler: Sampler = llm
    by_text = llm.generate(["the quick", "fox"], GREEDY)
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("the quick", "fox")]
    assert by_text == sampler.generate(ids, GREEDY)
    [alone] = llm.generate("the quick", GREEDY)
    assert alone.token_ids == by_text[0].token_ids


def test_completions_carry_their_text_without_special_tokens(
    llm: LLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = (*tokenizer.encode("fox <tool_call>"), tokenizer.id_of("<|im_end|>"))
    monkeypatch.setattr(llm.engine, "generate", lambda requests: [Completion(ids, (0.0,) * len(ids), "stop")])
    [completion] = llm.generate("the", GREEDY)
    assert completion.text == "fox <tool_call>"
    assert completion.token_ids == ids


def test_each_prompt_has_its_own_parameters(llm: LLM) -> None:
    many = [replace(GREEDY, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    assert [len(c.token_ids) for c in llm.generate(["the", "fox"], many)] == [2, 5]


def test_ids_may_be_of_torch(llm: LLM) -> None:
    assert llm.generate(torch.tensor([[5, 6, 7]]), GREEDY) == llm.generate([[5, 6, 7]], GREEDY)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [[None], [5, 6], [["the"]], [[1.5]]])
def test_a_prompt_that_is_none_is_named(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ConfigError, match=r"a prompt is .*; give a text, or a list of token ids"):
        llm.generate(prompts, GREEDY)


def test_parameters_are_one_or_as_many_as_prompts(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="3 prompts, but 2 sampling params; give one for all, or one for each"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("seed", range(3))
def test_streaming_gives_the_text_of_generate(llm: LLM, tokenizer: Tokenizer, seed: int, speculate: int) -> None:
    # Hot sampling of a random model: bytes that are no characters, halves of characters, special tokens.
    params = SamplingParams(max_tokens=60, temperature=3.0, seed=seed, ignore_eos=True, speculate=speculate)
    [completion] = llm.generate("the quick", params)
    pieces = list(llm.stream("the quick", params))
    assert "".join(pieces) == completion.text == tokenizer.decode(completion.token_ids, skip_special=True)
    assert "" not in pieces
    assert len(pieces) > 5
    assert [t for new in llm.stream_ids("the quick", params) for t in new] == list(completion.token_ids)


@pytest.fixture
def say(
    llm: LLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[int], SamplingParams], list[str]]:
    """Return a function that makes the model say given tokens, and returns what is streamed."""

    def say(ids: list[int], params: SamplingParams) -> list[str]:
        def run(requests: list[Request]) -> Iterator[News]:
            for token in ids:
                requests[0].extend([token], [0.0], [0.0], version=0)
                yield [(requests[0], [token])]
                if requests[0].finish_reason is not None:
                    return

        monkeypatch.setattr(llm.engine, "run", run)
        return list(llm.stream("", replace(params, max_tokens=len(ids))))

    return say


def test_a_character_is_never_streamed_in_halves(say: Callable[..., list[str]], tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é🙂x")
    assert len(ids) > 3
    assert say(ids, GREEDY) == ["é", "🙂", "x"]
    ids.append(tokenizer.encode("🙂")[0])
    assert say(ids, GREEDY) == ["é", "🙂", "x", "\ufffd"]  # cut off by the token limit


def test_stop_texts_and_end_tokens_are_not_streamed(say: Callable[..., list[str]], tokenizer: Tokenizer) -> None:
    params = replace(GREEDY, stop=("yz!", "ab"))
    assert "".join(say(tokenizer.encode("xyzyz!x"), params)) == "xyz"
    assert say(tokenizer.encode("xyzy"), params) == ["x", "yzy"]  # held back until no stop text can follow
    ended = [*tokenizer.encode("</think>x"), tokenizer.id_of("<|im_end|>"), *tokenizer.encode("x")]
    assert say(ended, params) == ["</think>", "x"]


@pytest.mark.parametrize("speculate", [0, 3])
def test_every_way_to_generate_ends_before_a_stop_text(llm: LLM, speculate: int) -> None:
    params = SamplingParams(max_tokens=60, temperature=3.0, seed=0, ignore_eos=True, speculate=speculate)
    whole = llm.generate("the quick", params)[0].text
    stopping = replace(params, stop=(whole[20:23],))
    expected = whole[: whole.index(whole[20:23])]
    [completion] = llm.generate("the quick", stopping)
    assert (completion.text, completion.finish_reason) == (expected, "stop")
    assert "".join(llm.stream("the quick", stopping)) == expected
    last = list(llm.updates("the quick", stopping))[-1].completion
    assert last is not None
    assert (last.text, last.token_ids) == (expected, completion.token_ids)


def test_chat_ends_before_a_stop_text(llm: LLM) -> None:
    question = [{"role": "user", "content": "the"}]
    params = SamplingParams(max_tokens=40, seed=5, ignore_eos=True)
    text = llm.generate([chat.encode_prompt(llm.tokenizer, question)], params)[0].text
    message = llm.chat(question, params=replace(params, stop=(text[9:12],)))
    assert message == chat.parse(text[: text.index(text[9:12])])


def test_chat_renders_the_messages_and_parses_the_answer(
    llm: LLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = (
        "Compute it.\n</think>\n<tool_call>\n<function=calculator>\n<parameter=expression>\n2 * 3\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>"
    )
    prompts: list[list[int]] = []

    def generate(requests: Sequence[Any]) -> list[Completion]:
        prompts.extend(request.prompt for request in requests)
        ids = tuple(tokenizer.encode(written))
        return [Completion(ids, (0.0,) * len(ids), "stop")]

    monkeypatch.setattr(llm.engine, "generate", generate)
    question, tools = [{"role": "user", "content": "What is 2 * 3?"}], [Calculator.schema]
    message = llm.chat(question, tools)
    assert message["role"] == "assistant"
    assert message["reasoning_content"] == "Compute it."
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"] == {"name": "calculator", "arguments": {"expression": "2 * 3"}}
    assert prompts == [chat.encode_prompt(tokenizer, question, tools)]


def test_chat_passes_the_sampling_parameters_on(llm: LLM, tokenizer: Tokenizer) -> None:
    question = [{"role": "user", "content": "the"}]
    params = SamplingParams(max_tokens=9, seed=5)
    [completion] = llm.generate([chat.encode_prompt(tokenizer, question)], params)
    assert llm.chat(question, params=params) == chat.parse(tokenizer.decode(completion.token_ids))


@pytest.mark.parametrize("rows", [4, 9, 1024])
def test_scores_are_the_log_softmax_of_the_logits(llm: LLM, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step35.engine.llm.SCORED", rows)
    sequences = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21], [5], []]
    for ids, scores in zip(sequences, llm.score(sequences), strict=True):
        with torch.no_grad():
            logprobs = llm.model(torch.tensor([ids], dtype=torch.long)).logits[0].log_softmax(-1)
        assert scores == pytest.approx([float(logprobs[t, ids[t + 1]]) for t in range(len(ids) - 1)], abs=1e-5)


def test_only_ids_of_the_vocabulary_have_scores(llm: LLM) -> None:
    for wrong in (-1, llm.model.config.vocab_size):
        with pytest.raises(ConfigError, match=f"token id {wrong} is outside the vocabulary"):
            llm.score([[5, wrong]])


def test_scores_agree_with_the_logprobs_of_generation(llm: LLM) -> None:
    prompt = [5, 6, 7]
    [completion] = llm.generate([prompt], SamplingParams(max_tokens=20, seed=2, ignore_eos=True))
    [scores] = llm.score([[*prompt, *completion.token_ids]])
    assert scores[len(prompt) - 1 :] == pytest.approx(completion.logprobs, abs=1e-4)


def test_new_weights_change_version_and_output(llm: LLM, build_model: Callable[..., Step35]) -> None:
    params = replace(GREEDY, ignore_eos=True)
    [before] = llm.generate(["the quick"], params)
    other = build_model(1, llm.tokenizer.vocab_size)
    llm.update_weights(other.state_dict(), 4)
    [after] = llm.generate(["the quick"], params)
    [expected] = LLM(model=other, tokenizer=llm.tokenizer).generate(["the quick"], params)
    assert (before.version, after.version) == (0, 4)
    assert after.token_ids == expected.token_ids != before.token_ids


def test_updated_weights_are_a_copy(llm: LLM, build_model: Callable[..., Step35]) -> None:
    actor = build_model(1, llm.tokenizer.vocab_size)
    llm.update_weights(actor.state_dict(), 1)
    before = llm.score([[5, 6, 7]])
    with torch.no_grad():
        actor.lm_head.weight.zero_()  # training goes on while the sampler keeps its version
    assert llm.score([[5, 6, 7]]) == before


def test_a_checkpoint_folder_gives_the_same_model(llm: LLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(llm.model, tmp_path, dtype=torch.float32)
    tokenizer.save(tmp_path)
    loaded = LLM(tmp_path)
    assert loaded.engine.eos_ids == llm.engine.eos_ids
    assert loaded.generate("the quick", GREEDY) == llm.generate("the quick", GREEDY)
    for dtype in ("bfloat16", torch.bfloat16):
        assert LLM(tmp_path, dtype=dtype).model.lm_head.weight.dtype == torch.bfloat16


def test_an_unknown_quantization_is_refused(model: Step35, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="quantization='int4' is unknown; choose none or int8"):
        LLM(model=model, tokenizer=tokenizer, quantization="int4")  # type: ignore[arg-type]


def test_a_model_without_a_tokenizer_is_refused(model: Step35) -> None:
    with pytest.raises(ValueError, match="tokenizer="):
        LLM(model=model)
