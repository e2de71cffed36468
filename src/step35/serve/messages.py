"""Messages and tools as clients send them, checked and made ready for the chat format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from step35.api.messages import Message, ToolSchema
from step35.serve.errors import ApiError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
TEXT_PARTS = ("text", "refusal")


def chat_messages(messages: Iterable[dict[str, Any]]) -> list[Message]:
    """Return the messages with the roles and keys of the chat format; raise `ApiError` for what it cannot say."""
    return [_message(message, f"messages.{index}") for index, message in enumerate(messages)]


def content_text(content: Any, place: str, kinds: Sequence[str] = TEXT_PARTS) -> str:
    """Return the text of a string, null, or a list of parts of these kinds; raise `ApiError` for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ApiError(f"{place} must be a string, null or a list of parts.", param=place)
    return "".join(_part_text(part, place, kinds) for part in content)


def check_tools(tools: Sequence[ToolSchema]) -> None:
    """Raise `ApiError` for tools that the chat format could show but not read calls of."""
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"tools.{index} needs a name that is a string.", param=f"tools.{index}")
        if not isinstance(function.get("parameters"), dict | None):
            raise ApiError(f"the parameters of tools.{index} must be a JSON schema.", param=f"tools.{index}")


def _part_text(part: Any, place: str, kinds: Sequence[str]) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds:
        raise ApiError(f"{place} has a part of type {kind!r:.60}; this model reads text only.", param=place)
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise ApiError(f"{place} has a part without text.", param=place)
    return text


def _message(message: dict[str, Any], place: str) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        allowed = ", ".join(ROLES)
        raise ApiError(f"{place}.role={role!r:.60} is not allowed; roles are {allowed}.", param=f"{place}.role")
    content = content_text(message.get("content"), f"{place}.content")
    ready = {**message, "role": ROLES[role], "content": content}
    if "reasoning" in message:  # the newer name of some servers
        ready.setdefault("reasoning_content", message["reasoning"])
    if not isinstance(ready.get("reasoning_content"), str | None):
        raise ApiError(f"{place}.reasoning_content must be a string.", param=f"{place}.reasoning_content")
    _check_calls(ready.get("tool_calls") or [], f"{place}.tool_calls")
    return cast("Message", ready)


def _check_calls(calls: Any, place: str) -> None:
    """Raise `ApiError` unless `calls` is a list of objects; the chat format checks names and arguments."""
    shaped = isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    if not shaped or not all(isinstance(call.get("function"), dict | None) for call in calls):
        raise ApiError(f"{place} must be a list of calls, each with a function.", param=place)
