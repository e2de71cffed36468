"""Chat messages as the OpenAI API spells them: plain dictionaries with known keys."""

from __future__ import annotations

from typing import Any, TypedDict


class Function(TypedDict, total=False):
    """A function call: its name and its arguments (a mapping, or the JSON text of one)."""

    name: str
    arguments: dict[str, Any] | str


class ToolCall(TypedDict, total=False):
    """A call as the API sends it (`function` nested) or flat (`name`, `arguments`)."""

    id: str
    type: str
    function: Function
    name: str
    arguments: dict[str, Any] | str


class Message(TypedDict, total=False):
    """One turn. `role` is system, user, assistant or tool."""

    role: str
    content: Any
    name: str
    reasoning_content: str | None
    tool_calls: list[ToolCall]
    tool_call_id: str
    loss_mask: int | None
    """0 leaves an assistant's turn out of the loss of fine-tuning; the released SFT data say so of every turn."""


ToolSchema = dict[str, Any]
"""One OpenAI tool object: {"type": "function", "function": {"name", "description", "parameters"}}."""
