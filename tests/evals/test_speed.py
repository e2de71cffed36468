"""Decode speed with a fake stream and a fake clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.evals import speed


class Clock:
    """A clock that only the streams advance."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


class Stream:
    """Emits 1, 2, 3, ...: a prompt pass of 10 s, then passes of `pass_s` with `1 + accepted` tokens."""

    def __init__(self, clock: Clock, *, accepted: int, pass_s: float = 1.0) -> None:
        self.clock, self.accepted, self.pass_s = clock, accepted, pass_s
        self.calls: list[int] = []

    def __call__(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[list[int]]:
        assert params.temperature == 0
        self.calls.append(params.speculate)
        self.clock.now += 10
        yield [1]
        size = 1 + self.accepted * (params.speculate > 0)
        for start in range(1, params.max_tokens, size):
            self.clock.now += self.pass_s
            yield list(range(start + 1, min(start + size, params.max_tokens) + 1))


def test_the_prompt_is_not_timed(clock: Clock) -> None:
    tokens, seconds = speed.decode(Stream(clock, accepted=0), [7], SamplingParams(max_tokens=5, temperature=0.0))
    assert tokens == [1, 2, 3, 4, 5]
    assert seconds == 4.0


def test_the_rates_and_their_ratio(clock: Clock) -> None:
    stream = Stream(clock, accepted=2, pass_s=0.5)
    result = speed.compare(stream, [[7], [8, 9]], depth=3, max_tokens=13, repeats=3)
    assert result["plain_tokens_per_s"] == pytest.approx(2.0)
    assert result["speculative_tokens_per_s"] == pytest.approx(6.0)
    assert result["speedup"] == pytest.approx(3.0)
    assert result["equal"] is True
    assert (result["prompts"], result["tokens"], result["depth"]) == (2, 26, 3)


def test_plain_and_speculative_alternate_behind_a_warm_up(clock: Clock) -> None:
    stream = Stream(clock, accepted=2)
    speed.compare(stream, [[7], [8]], depth=2, max_tokens=4, repeats=2)
    assert stream.calls == [0, 2] * 2 * 3


def test_only_the_fastest_round_counts(clock: Clock) -> None:
    seconds = iter(
        [0.1, 0.1, 50.0, 1.0, 1.0, 60.0, 2.0, 3.0]
    )  # the warm-up, then three rounds of plain and speculative

    def stream(prompt: Sequence[int], params: SamplingParams) -> Iterator[list[int]]:
        yield [1]
        clock.now += next(seconds)
        yield [2, 3]

    result = speed.compare(stream, [[7]], depth=1, max_tokens=3, repeats=3)
    assert result["plain_tokens_per_s"] == pytest.approx(2.0)
    assert result["speedup"] == pytest.approx(1.0)


def test_different_tokens_are_reported(clock: Clock) -> None:
    def stream(prompt: Sequence[int], params: SamplingParams) -> Iterator[list[int]]:
        for token in (1, 2, 3 + (params.speculate > 0 and prompt == [8])):
            clock.now += 1
            yield [token]

    assert speed.compare(stream, [[7], [9]], depth=2, max_tokens=3)["equal"] is True
    assert speed.compare(stream, [[7], [8]], depth=2, max_tokens=3)["equal"] is False


def test_answers_of_one_token_have_no_speed_but_are_compared(clock: Clock) -> None:
    def stream(prompt: Sequence[int], params: SamplingParams) -> Iterator[list[int]]:
        clock.now += 1
        yield [1]
        clock.now += 1e-6

    result = speed.compare(stream, [[7]], depth=2, max_tokens=1)
    assert result["equal"] is True
    assert result["tokens"] == 1


class Counting:
    """A sampler whose completions carry given counts of drafts."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        assert isinstance(params, SamplingParams)
        assert (params.temperature, params.speculate, params.max_tokens) == (0.0, 3, 9)
        counts = [((10, 6, 0), (6, 3, 0)), ((30, 2, 0), (4, 1, 0))]
        return [Completion((1,), (0.0,), "stop", drafted=d, accepted=a) for d, a in counts[: len(prompts)]]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise AssertionError

    def update_weights(self, state: Mapping[str, Any], version: int) -> None:
        raise AssertionError


def test_acceptance_weighs_drafts_not_prompts() -> None:
    assert speed.acceptance(Counting(), [[1], [2]], depth=3, max_tokens=9) == [10 / 40, 4 / 8, 0.0]
