"""The tool loop of one user request: generate, run the calls, show the results, until the model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from step35.api.messages import Message, ToolCall
from step35.api.tools import Tool
from step35.data.chat import read_call
from step35.errors import DataError

Generate = Callable[[list[Message]], Message]
"""Continues a conversation by one assistant turn."""


def respond(
    generate: Generate, messages: list[Message], tools: Mapping[str, Tool], *, max_turns: int = 8
) -> Iterator[Message]:
    """Yield each new message (assistant turns and tool results), appending them to `messages`.

    Ends with the first assistant turn without calls, or after `max_turns` assistant turns.
    """
    for _ in range(max_turns):
        turn = generate(messages)
        messages.append(turn)
        yield turn
        calls = turn.get("tool_calls") or []
        for call in calls:
            result = Message(role="tool", content=run_call(call, tools), tool_call_id=call.get("id", ""))
            messages.append(result)
            yield result
        if not calls:
            return


def run_call(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """Run one call; whatever is wrong with it is an answer to the model, not an exception."""
    try:
        name, arguments = read_call(call)
    except DataError as error:
        return f"error: {error}"
    if name not in tools:
        return f"error: no tool named {name}; there are: {', '.join(tools)}"
    return tools[name](arguments)
