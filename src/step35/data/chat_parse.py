"""The text of a whole generated turn back to a message; `chat_stream` does the reading and states the rules."""

from __future__ import annotations

from collections.abc import Sequence

from step35.api.messages import Message, ToolSchema
from step35.data.chat_stream import TurnParser


def parse(text: str, tools: Sequence[ToolSchema] | None = None, *, thinking: bool = True) -> Message:
    """Return the assistant message in `text` (what follows `<think>\\n`; never raises).

    Without `</think>` all of it is reasoning; with `thinking=False` the prompt has closed the think block and
    none of it is. Values are typed by the schemas in `tools`; a value that does not convert stays a string.
    `tool_calls` is absent when there are none. A text cut off by a token limit parses too: whoever knows that
    it was cut decides whether to trust its last call.
    """
    parser = TurnParser(tools, thinking=thinking)
    parser.feed(text)
    parser.finish()
    return parser.message
