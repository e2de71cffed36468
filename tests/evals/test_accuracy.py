"""pass@1 with a sampler and an environment whose results are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from step35.api.environment import Outcome, Task
from step35.api.messages import Message
from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.config.post import EvalConfig
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.evals.accuracy import accuracy
from step35.evals.stats import wilson


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["even odd problem number"], 300)


class Parity:
    """Problem i asks for the number i; a judgement of "?" is no verdict."""

    def sample(self, index: int) -> Task:
        return Task((Message(role="user", content=f"problem {index}"),), answer=str(index))

    def respond(self, task: Task, history: list[Message], turn: Message) -> Outcome:
        if turn["content"] == "?":
            return Outcome(done=True, reward=None)
        if turn["content"] == "call":
            return Outcome((Message(role="tool", content="error: no"),), tool_errors=1)
        return Outcome(done=True, reward=float(turn["content"] == task.answer))


class Scripted:
    """Answers problem i by `script(i, how often it was asked before)`, and keeps the parameters it got."""

    def __init__(self, tokenizer: Tokenizer, script: Any) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.params: list[SamplingParams] = []
        self.asked: dict[int, int] = {}

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        many = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        self.params += many
        return [self._answer(list(prompt), own.max_tokens) for prompt, own in zip(prompts, many, strict=True)]

    def _answer(self, prompt: list[int], max_tokens: int) -> Completion:
        number = int(self.tokenizer.decode(prompt).split("problem ")[1].split("<")[0])
        written = self.script(number, self.asked.get(number, 0))
        self.asked[number] = self.asked.get(number, 0) + 1
        ids = tuple(self.tokenizer.encode(f"\n</think>\n{written}<|im_end|>"))
        reason = "stop" if len(ids) <= max_tokens else "length"
        return Completion(ids[:max_tokens], (0.0,) * len(ids[:max_tokens]), reason)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise AssertionError("accuracy does not score")

    def update_weights(self, state: Mapping[str, Any], version: int) -> None:
        raise AssertionError("accuracy does not train")


def test_greedy_accuracy_of_a_sampler_that_is_right_on_even_problems(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, lambda i, before: str(i) if i % 2 == 0 else "wrong")
    config = EvalConfig(problems=10, max_turn_tokens=50)
    result, played = accuracy(sampler, Parity(), tokenizer, config, greedy=True)
    assert (result["mode"], result["n"], result["samples"]) == ("greedy", 10, 1)
    assert (result["correct"], result["accuracy"]) == (5, 0.5)
    assert (result["low"], result["high"]) == wilson(5, 10)
    assert (result["truncated"], result["tool_errors"]) == (0.0, 0.0)
    assert [t.reward for t in played] == [1.0, 0.0] * 5
    assert [t.info["answer"] for t in played] == [str(i) for i in range(10)]
    assert {(p.temperature, p.max_tokens) for p in sampler.params} == {(0.0, 50)}


def test_sampled_accuracy_averages_the_samples_and_counts_problems(tokenizer: Tokenizer) -> None:
    # The first five problems are solved by the first of their four samples only.
    sampler = Scripted(tokenizer, lambda i, before: str(i) if i < 5 and before == 0 else "wrong")
    config = EvalConfig(problems=8, samples=4, max_turn_tokens=50)
    result, played = accuracy(sampler, Parity(), tokenizer, config, greedy=False)
    assert (result["mode"], result["n"], result["samples"]) == ("sampled", 8, 4)
    assert result["accuracy"] == pytest.approx(5 / 32)
    assert result["correct"] == pytest.approx(1.25)
    assert (result["low"], result["high"]) == wilson(1.25, 8)
    assert sampler.asked == dict.fromkeys(range(8), 4)
    assert len(played) == 32
    assert {p.temperature for p in sampler.params} == {1.0}
    assert len({p.seed for p in sampler.params}) == 32


def test_problems_without_a_verdict_do_not_count(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, lambda i, before: "?" if i < 4 else str(i))
    result, played = accuracy(sampler, Parity(), tokenizer, EvalConfig(problems=10, max_turn_tokens=50), greedy=True)
    assert (result["n"], result["correct"], result["accuracy"]) == (6, 6, 1.0)
    assert [t.reward for t in played[:4]] == [None] * 4


def test_truncated_turns_are_wrong_and_counted(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, lambda i, before: "word " * 40 if i == 3 else str(i))
    result, played = accuracy(sampler, Parity(), tokenizer, EvalConfig(problems=4, max_turn_tokens=20), greedy=True)
    assert (result["correct"], result["truncated"]) == (3, 0.25)
    assert [t.truncated for t in played] == [False, False, False, True]


def test_tool_errors_are_averaged(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, lambda i, before: "call" if i == 1 and before == 0 else str(i))
    result, _ = accuracy(sampler, Parity(), tokenizer, EvalConfig(problems=4, max_turn_tokens=50), greedy=True)
    assert result["tool_errors"] == 0.25
    assert result["accuracy"] == 1.0


def test_progress_adds_up_to_all_episodes(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, lambda i, before: "call" if i % 3 == 0 and before == 0 else str(i))
    finished: list[int] = []
    accuracy(
        sampler, Parity(), tokenizer, EvalConfig(problems=9, max_turn_tokens=50), greedy=True, on_done=finished.append
    )
    assert finished == [6, 3]


def test_the_same_seed_samples_the_same_way(tokenizer: Tokenizer) -> None:
    def seeds(seed: int) -> list[int | None]:
        sampler = Scripted(tokenizer, lambda i, before: str(i))
        accuracy(sampler, Parity(), tokenizer, EvalConfig(problems=3, seed=seed), greedy=False)
        return [p.seed for p in sampler.params]

    assert seeds(1) == seeds(1) != seeds(2)
