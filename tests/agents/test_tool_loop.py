"""The tool loop with a scripted model and recording tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from step35.agents.loop import respond, run_call
from step35.api.messages import Message, ToolSchema


class Recorder:
    """A tool that notes its arguments and answers with a count."""

    name = "recorder"
    schema: ToolSchema = {"type": "function", "function": {"name": name}}  # noqa: RUF012 (as the protocol has it)

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, arguments: dict[str, Any]) -> str:
        self.seen.append(arguments)
        return f"result {len(self.seen)}"


def call(name: str, arguments: Any, number: int = 0) -> Any:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def scripted(*turns: Message) -> tuple[Callable[[list[Message]], Message], list[list[Message]]]:
    """Return a model that plays `turns`, repeating the last, and the conversations it was shown."""
    shown: list[list[Message]] = []

    def generate(messages: list[Message]) -> Message:
        shown.append(list(messages))
        return turns[min(len(shown), len(turns)) - 1]

    return generate, shown


ANSWER = Message(role="assistant", content="42")
QUESTION = Message(role="user", content="?")


def test_an_answer_without_calls_ends_the_loop() -> None:
    generate, shown = scripted(ANSWER)
    messages = [QUESTION]
    assert list(respond(generate, messages, {})) == [ANSWER]
    assert messages == [QUESTION, ANSWER]
    assert shown == [[QUESTION]]


def test_calls_run_in_order_and_their_results_are_shown_to_the_model() -> None:
    tool = Recorder()
    first = Message(
        role="assistant", content="", tool_calls=[call("recorder", {"x": 1}), call("recorder", {"x": 2}, 1)]
    )
    second = Message(role="assistant", content="", tool_calls=[call("recorder", '{"x": 3}', 2)])
    generate, shown = scripted(first, second, ANSWER)
    messages = [QUESTION]
    new = list(respond(generate, messages, {"recorder": tool}))
    results = [Message(role="tool", content=f"result {n + 1}", tool_call_id=f"call_{n}") for n in range(3)]
    assert new == [first, results[0], results[1], second, results[2], ANSWER]
    assert messages == [QUESTION, *new]
    assert tool.seen == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert shown == [[QUESTION], [QUESTION, *new[:3]], [QUESTION, *new[:5]]]


def test_each_message_is_there_as_soon_as_it_is_made() -> None:
    tool = Recorder()
    turn = Message(role="assistant", content="", tool_calls=[call("recorder", {})])
    generate, shown = scripted(turn, ANSWER)
    running = respond(generate, [QUESTION], {"recorder": tool})
    assert next(running) == turn
    assert tool.seen == []  # the caller sees the call before it runs
    assert next(running)["role"] == "tool"
    assert len(shown) == 1


def test_an_unknown_tool_is_an_answer() -> None:
    turn = Message(role="assistant", content="", tool_calls=[call("search", {})])
    generate, _ = scripted(turn, ANSWER)
    new = list(respond(generate, [QUESTION], {"recorder": Recorder()}))
    assert new[1]["role"] == "tool"
    assert new[1]["content"] == "error: no tool named search; there are: recorder"
    assert new[2] == ANSWER


def test_unreadable_arguments_are_an_answer() -> None:
    tool = Recorder()
    for arguments in ("{broken", [1, 2], 7):
        assert run_call(call("recorder", arguments), {"recorder": tool}).startswith("error: ")
    assert run_call({"type": "function"}, {"recorder": tool}).startswith("error: ")
    assert tool.seen == []


def test_the_loop_ends_after_max_turns() -> None:
    tool = Recorder()
    generate, shown = scripted(Message(role="assistant", content="", tool_calls=[call("recorder", {})]))
    messages = [QUESTION]
    new = list(respond(generate, messages, {"recorder": tool}, max_turns=3))
    assert [message["role"] for message in new] == ["assistant", "tool"] * 3
    assert messages == [QUESTION, *new]
    assert len(shown) == len(tool.seen) == 3
