from __future__ import annotations

from typing import Any

import pytest

from step35.agents.envs.arithmetic import ArithmeticEnvironment
from step35.agents.synth.arithmetic import demonstration
from step35.agents.tools.calculator import Calculator
from step35.api.environment import Environment
from step35.api.tools import Tool
from step35.data import chat
from step35.data.arithmetic import Problem, held_out, problem
from step35.errors import DataError

CALCULATOR: Tool = Calculator()
ENVIRONMENT: Environment = ArithmeticEnvironment("held_out", 0, CALCULATOR)


def call(name: str, arguments: Any, call_id: str = "call_0") -> Any:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def respond(**turn: Any) -> Any:
    task = ENVIRONMENT.sample(0)
    return ENVIRONMENT.respond(task, list(task.messages), {"role": "assistant", **turn})


def test_tasks_are_fixed_and_of_their_split() -> None:
    task = ENVIRONMENT.sample(5)
    assert task == ArithmeticEnvironment("held_out", 0, CALCULATOR).sample(5)
    assert task != ArithmeticEnvironment("held_out", 1, CALCULATOR).sample(5)
    assert task.messages == ({"role": "user", "content": problem(5, split="held_out", seed=0).question},)
    assert task.tools == (CALCULATOR.schema,)
    first = int(task.info["expression"].replace("(", "").split()[0])
    assert held_out(first)


def test_calls_are_executed_in_order() -> None:
    calls = [call("calculator", {"expression": "2 * 3"}), call("calculator", {"expression": "1 +"}, "call_1")]
    outcome = respond(content="", tool_calls=calls)
    first, second = outcome.observations
    assert first == {"role": "tool", "content": "6", "tool_call_id": "call_0"}
    assert second["content"].startswith("error: ")
    assert second["tool_call_id"] == "call_1"
    assert (outcome.done, outcome.reward, outcome.tool_errors) == (False, None, 1)


@pytest.mark.parametrize(
    "bad",
    [
        call("python", {"expression": "1"}),
        call("calculator", {}),
        call("calculator", "{"),
        call("calculator", [1]),
        {},
    ],
)
def test_bad_calls_are_observations(bad: Any) -> None:
    outcome = respond(tool_calls=[bad])
    assert outcome.observations[0]["content"].startswith("error: ")
    assert (outcome.done, outcome.tool_errors) == (False, 1)


def test_only_the_exact_answer_is_rewarded() -> None:
    answer = ENVIRONMENT.sample(0).answer
    for right in (answer, f" {answer}\n", f"{answer}."):
        outcome = respond(content=right)
        assert (outcome.done, outcome.reward, outcome.observations) == (True, 1.0, ())
    for wrong in ("", None, f"{answer}0", f"It is {answer}", f"{answer}..", f"-{answer}", f"{answer}.0"):
        assert respond(content=wrong).reward == 0.0


@pytest.mark.parametrize("mistakes", [0.0, 1.0])
def test_demonstrations_earn_the_reward_they_teach(mistakes: float) -> None:
    environment = ArithmeticEnvironment("train", 0, CALCULATOR)
    reasonings = set()
    for index in range(60):
        task = environment.sample(index)
        messages = demonstration(problem(index, split="train", seed=0), CALCULATOR, index=index, mistakes=mistakes)
        history, errors = list(task.messages), 0
        while len(history) < len(messages):
            generated = [text for text, mark in chat.segments(messages[: len(history) + 1]) if mark][-1]
            turn = chat.parse(generated, task.tools)
            assert turn == messages[len(history)]
            outcome = environment.respond(task, history, turn)
            errors += outcome.tool_errors
            history += [turn, *outcome.observations]
            reasonings.add(turn["reasoning_content"])
        assert history == messages
        assert (outcome.done, outcome.reward) == (True, 1.0)
        assert errors == mistakes
        assert len(messages) == 4 + 2 * mistakes
    assert len(reasonings) > 5
    assert all(len(reasoning) < 30 for reasoning in reasonings)


def test_mistakes_are_rare_when_asked_to_be() -> None:
    lengths = [
        len(demonstration(problem(index, split="train", seed=0), CALCULATOR, index=index, mistakes=0.1))
        for index in range(300)
    ]
    assert 10 < lengths.count(6) < 60
    assert lengths.count(4) == 300 - lengths.count(6)


def test_a_demonstration_never_teaches_a_wrong_output() -> None:
    with pytest.raises(DataError, match=r"'4'.*'5'"):
        demonstration(Problem("2 plus 2?", "2 + 2", "5"), CALCULATOR)
