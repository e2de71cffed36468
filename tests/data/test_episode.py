"""Playing tasks with a scripted sampler and a scripted environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from step35.api.environment import Outcome, Task
from step35.api.messages import Message
from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.api.trajectory import Trajectory
from step35.data import chat
from step35.data.episode import play
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.runtime.seeding import derive

CALL = "Count.\n</think>\n<tool_call>\n<function=count>\n</function>\n</tool_call><|im_end|>"
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["count the things", CALL], 320)


def answer(text: str) -> str:
    return f"Done.\n</think>\n{text}<|im_end|>"


class Scripted:
    """Writes `turns[problem][turn]`, each time under weights one version newer; keeps what it was asked."""

    def __init__(self, tokenizer: Tokenizer, turns: dict[str, list[str]]) -> None:
        self.tokenizer, self.turns = tokenizer, turns
        self.prompts: list[list[list[int]]] = []
        self.params: list[list[SamplingParams]] = []
        self.written: list[Completion] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        assert not isinstance(params, SamplingParams)
        self.prompts.append([list(prompt) for prompt in prompts])
        self.params.append(list(params))
        new = [self._write(prompt, own.max_tokens) for prompt, own in zip(prompts, params, strict=True)]
        self.written += new
        return new

    def _write(self, prompt: Sequence[int], max_tokens: int) -> Completion:
        text = self.tokenizer.decode(list(prompt))
        turn = text.count("<|im_start|>assistant") - 1
        ids = self.tokenizer.encode(self.turns[text.split("problem ")[1][0]][turn])
        # "co" + "unt" instead of the one token "count": sampled ids need not be those that encode would give.
        ids = [part for token in ids for part in self._split(token)]
        reason, ids = ("stop", ids) if len(ids) <= max_tokens else ("length", ids[:max_tokens])
        logprobs = tuple(-0.5 - 0.01 * i for i in range(len(ids)))
        return Completion(tuple(ids), logprobs, reason, version=len(self.prompts))

    def _split(self, token: int) -> list[int]:
        text = self.tokenizer.decode([token])
        return [self.tokenizer.encode(letter)[0] for letter in text] if text == "Count" else [token]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise AssertionError("play does not score")

    def update_weights(self, state: Mapping[str, Any], version: int) -> None:
        raise AssertionError("play does not train")


class Counting:
    """Answers calls with a count; judges a final answer by `rewards`; keeps the histories it was shown."""

    def __init__(self, rewards: dict[str, float | None]) -> None:
        self.rewards = rewards
        self.seen: list[tuple[list[Message], Message]] = []

    def sample(self, index: int) -> Task:
        name = "abcdef"[index]
        return Task((Message(role="user", content=f"problem {name}"),), (TOOL,), answer=name)

    def respond(self, task: Task, history: list[Message], turn: Message) -> Outcome:
        self.seen.append((list(history), turn))
        if turn.get("tool_calls"):
            return Outcome((Message(role="tool", content=f"error: {len(history)}"),), tool_errors=1)
        return Outcome(done=True, reward=self.rewards[turn["content"]])


def run(
    sampler: Scripted, environment: Counting, tasks: int, *, max_turns: int = 3, max_tokens: int = 200, **more: Any
) -> list[Trajectory]:
    return play(
        sampler,
        environment,
        sampler.tokenizer,
        [environment.sample(i) for i in range(tasks)],
        SamplingParams(max_tokens=max_tokens, temperature=0.8, top_p=0.9),
        seeds=[100 + i for i in range(tasks)],
        max_turns=max_turns,
        **more,
    )


def acted(trajectory: Trajectory) -> list[int]:
    return [token for token, own in zip(trajectory.tokens, trajectory.mask, strict=True) if own]


def test_tokens_are_those_of_the_whole_conversation(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, {"a": [CALL, answer("7")]})
    environment = Counting({"7": 1.0})
    [played] = run(sampler, environment, 1)
    history, last = environment.seen[-1]
    # All but the sampled spelling is what encoding the finished conversation gives.
    whole, mask = chat.encode(tokenizer, [*history, last], [TOOL])
    assert tokenizer.decode(played.tokens) == tokenizer.decode(whole).removesuffix("\n")
    given = [t for t, own in zip(played.tokens, played.mask, strict=True) if not own]
    assert given == [t for t, own in zip(whole, mask, strict=True) if not own][: len(given)]
    assert played.reward == 1.0
    assert not played.truncated


def test_what_was_sampled_is_kept_token_by_token(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, {"a": [CALL, CALL, answer("7")]})
    [played] = run(sampler, Counting({"7": 1.0}), 1)
    assert len(sampler.written) == 3
    sampled = [token for completion in sampler.written for token in completion.token_ids]
    assert acted(played) == sampled
    assert sampled[:2] != tokenizer.encode(CALL)[:2]  # the sampled spelling is not the tokenizer's
    # Each prompt continues, token by token, what came before.
    [first], [second], [third] = sampler.prompts
    assert second[: len(first)] == first
    assert third[: len(second)] == second
    assert played.tokens[: len(third)] == third
    assert tuple(second[len(first) :][: len(sampler.written[0].token_ids)]) == sampler.written[0].token_ids


def test_masks_logprobs_and_versions_line_up(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, {"a": [CALL, answer("7")], "b": [answer("8")]})
    for played, turns in zip(run(sampler, Counting({"7": 1.0, "8": 0.0}), 2), ([0, 2], [1]), strict=True):
        length = len(played.tokens)
        assert len(played.mask) == len(played.logprobs) == len(played.versions) == length
        expected = [
            (token, logprob, sampler.written[turn].version)
            for turn in turns
            for token, logprob in zip(sampler.written[turn].token_ids, sampler.written[turn].logprobs, strict=True)
        ]
        columns = list(zip(played.tokens, played.logprobs, played.versions, played.mask, strict=True))
        assert [row[:3] for row in columns if row[3]] == expected
        assert {row[1:3] for row in columns if not row[3]} == {(0.0, -1)}


def test_the_environment_sees_the_parsed_conversation(tokenizer: Tokenizer) -> None:
    environment = Counting({"7": 1.0})
    [played] = run(Scripted(tokenizer, {"a": [CALL, answer("7")]}), environment, 1)
    (first_history, first), (second_history, second) = environment.seen
    assert [message["role"] for message in first_history] == ["user"]
    assert first["reasoning_content"] == "Count."
    assert first["tool_calls"][0]["function"] == {"name": "count", "arguments": {}}
    assert second_history == [*first_history, first, Message(role="tool", content="error: 1")]
    assert second["content"] == "7"
    assert played.info == {"question": "problem a", "answer": "a", "tool_errors": 1}


def test_a_cut_turn_ends_the_episode_unjudged(tokenizer: Tokenizer) -> None:
    environment = Counting({"7": 1.0, "8": 1.0})
    sampler = Scripted(tokenizer, {"a": [answer("7" * 50)], "b": [answer("8")]})
    cut, whole = run(sampler, environment, 2, max_tokens=30)
    assert (cut.truncated, cut.reward) == (True, 0.0)
    assert sum(cut.mask) == 30
    assert (whole.truncated, whole.reward) == (False, 1.0)
    assert len(environment.seen) == 1


def test_the_last_turn_without_an_answer_is_truncation(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, {"a": [CALL] * 5, "b": [CALL, answer("7")]})
    endless, finished = run(sampler, Counting({"7": 1.0}), 2, max_turns=2)
    assert (endless.truncated, endless.reward) == (True, 0.0)
    assert endless.mask[-1]  # nothing is said behind a turn that no other follows
    assert endless.info["tool_errors"] == 2
    assert (finished.truncated, finished.reward) == (False, 1.0)
    assert len(sampler.prompts) == 2


def test_no_verdict_is_not_a_zero(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, {"a": [answer("?")], "b": [answer("7")]})
    unknown, wrong = run(sampler, Counting({"?": None, "7": 0.0}), 2)
    assert unknown.reward is None
    assert not unknown.truncated
    assert wrong.reward == 0.0


def test_each_turn_of_each_episode_has_its_own_seed(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, {"a": [answer("7")], "b": [CALL, CALL, answer("7")], "c": [CALL, answer("7")]})
    run(sampler, Counting({"7": 1.0}), 3)
    seeds = [[own.seed for own in params] for params in sampler.params]
    assert seeds == [
        [derive(100, 0), derive(101, 0), derive(102, 0)],
        [derive(101, 1), derive(102, 1)],
        [derive(101, 2)],
    ]
    assert len({seed for turn in seeds for seed in turn}) == 6
    assert {(p.temperature, p.top_p, p.max_tokens) for params in sampler.params for p in params} == {(0.8, 0.9, 200)}


def test_progress_counts_every_episode_once(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, {"a": [answer("7")], "b": [CALL, CALL, answer("7")], "c": [answer("7")]})
    finished: list[int] = []
    run(sampler, Counting({"7": 1.0}), 3, on_done=finished.append)
    assert finished == [2, 0, 1]


def test_seeds_must_match_the_tasks(tokenizer: Tokenizer) -> None:
    sampler = Scripted(tokenizer, {"a": [answer("7")]})
    environment = Counting({"7": 1.0})
    with pytest.raises(ValueError):
        play(sampler, environment, tokenizer, [environment.sample(0)], SamplingParams(), seeds=[], max_turns=1)
