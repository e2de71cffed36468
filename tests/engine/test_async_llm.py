"""Many callers at once: streams give what `LLM` gives, and whoever leaves takes nothing along."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from step35.api.sampler import Update
from step35.api.sampling import SamplingParams
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.engine.async_llm import AsyncLLM
from step35.engine.llm import LLM
from step35.engine.runner import Runner
from step35.errors import ConfigError
from step35.model.step35 import Step35

PROMPTS = ["the quick", "brown fox jumps", "over", "the lazy dog the lazy dog"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog ünïcödé"] * 5, 300)


@pytest.fixture
def llm(build_model: Callable[..., Step35], tokenizer: Tokenizer) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(model=build_model(seed=3, vocab=tokenizer.vocab_size), tokenizer=tokenizer, max_batch=3)
    yield llm
    llm.close()


def params(seed: int, tokens: int = 30) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, speculate=seed % 4, ignore_eos=True)


async def collect(llm: AsyncLLM, prompt: str, settings: SamplingParams) -> list[Update]:
    return [update async for update in llm.stream(llm.tokenizer.encode(prompt), settings)]


def test_streams_join_to_the_completion_and_equal_generate(llm: AsyncLLM, tokenizer: Tokenizer) -> None:
    async def run() -> list[list[Update]]:
        return await asyncio.gather(*(collect(llm, p, params(n)) for n, p in enumerate(PROMPTS)))

    blocking = LLM(model=llm.model, tokenizer=tokenizer)
    expected = blocking.generate([tokenizer.encode(p) for p in PROMPTS], [params(n) for n in range(len(PROMPTS))])
    for updates, whole in zip(asyncio.run(run()), expected, strict=True):
        assert tuple(token for u in updates for token in u.token_ids) == whole.token_ids
        assert "".join(u.text for u in updates) == tokenizer.decode(whole.token_ids)
        assert [u.finish_reason for u in updates[:-1]] == [None] * (len(updates) - 1)
        assert updates[-1].completion is not None
        assert updates[-1].completion.token_ids == whole.token_ids
        assert updates[-1].finish_reason == "length"


def test_what_a_slow_reader_has_not_read_yet_comes_at_once(llm: AsyncLLM, tokenizer: Tokenizer) -> None:
    async def run() -> list[Update]:
        updates = []
        async for update in llm.stream(tokenizer.encode("the"), params(0, 500)):
            updates.append(update)
            if len(updates) == 1:
                while llm.statistics().get("finished", 0) < 1:  # the event loop stands still
                    time.sleep(0.001)
                llm._call(bool).result()  # done by the engine's thread once the last pass has been sent
        return updates

    updates = asyncio.run(run())
    assert len(updates) == 2
    assert updates[1].completion is not None
    assert updates[1].completion.token_ids == updates[0].token_ids + updates[1].token_ids
    assert updates[1].completion.logprobs == updates[0].logprobs + updates[1].logprobs
    assert updates[0].text + updates[1].text == tokenizer.decode(updates[1].completion.token_ids)


def test_whoever_stops_reading_is_cancelled(llm: AsyncLLM) -> None:
    async def leave() -> None:
        stream = llm.stream([5, 6, 7], params(1, 3000))
        async for _ in stream:
            break
        await stream.aclose()
        reader = asyncio.create_task(collect(llm, "the", params(2, 3000)))
        await asyncio.sleep(0.05)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await llm.score([[4, 5]])  # the engine's thread takes up one job after the other

    asyncio.run(leave())
    statistics = llm.statistics()
    assert statistics["running"] == statistics["waiting"] == 0
    assert statistics["full_blocks_held"] == statistics["window_blocks_held"] == 0


def test_bad_requests_fail_in_their_own_call(llm: AsyncLLM) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        asyncio.run(collect(llm, "", params(0)))
    assert asyncio.run(collect(llm, "the", params(0, 2)))


def test_an_error_in_a_pass_reaches_the_callers_and_the_engine_goes_on(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "run", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            asyncio.run(collect(llm, "the", params(0)))
    assert len(asyncio.run(collect(llm, "the", params(0, 2)))) > 0


def test_new_weights_arrive_while_a_stream_runs(llm: AsyncLLM, build_model: Callable[..., Step35]) -> None:
    async def run() -> list[Update]:
        state = build_model(seed=4, vocab=llm.tokenizer.vocab_size).state_dict()
        updates = []
        async for update in llm.stream([5, 6, 7], params(0, 200)):
            updates.append(update)
            if len(updates) == 3:
                await llm.update_weights(state, 9)
        return updates

    completion = asyncio.run(run())[-1].completion
    assert completion is not None
    assert completion.versions[0] == 0
    assert completion.versions[-1] == 9
    assert sorted(completion.versions) == list(completion.versions)


def test_a_closed_engine_says_so(build_model: Callable[..., Step35], tokenizer: Tokenizer) -> None:
    llm = AsyncLLM(model=build_model(seed=3, vocab=tokenizer.vocab_size), tokenizer=tokenizer)
    llm.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        asyncio.run(collect(llm, "the", params(0)))
