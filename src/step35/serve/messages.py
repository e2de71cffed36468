"""Messages as clients send them, made ready for the chat format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from step35.api.messages import Message
from step35.serve.errors import ApiError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def chat_messages(messages: Iterable[dict[str, Any]]) -> list[Message]:
    """Return the messages with the roles and keys of the chat format; raise `ApiError` for what it cannot say."""
    return [_message(message, f"messages.{index}") for index, message in enumerate(messages)]


def _message(message: dict[str, Any], place: str) -> Message:
    role = message.get("role")
    if role not in ROLES:
        raise ApiError(f"{place}.role={role!r} is not allowed; roles are {', '.join(ROLES)}.", param=f"{place}.role")
    if isinstance(content := message.get("content"), list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(part, str) and kind not in ("text", "refusal"):
                raise ApiError(
                    f"{place}.content has a part of type {kind!r}; this model reads text only.",
                    param=f"{place}.content",
                )
        content = "".join(part if isinstance(part, str) else part.get(part["type"]) or "" for part in content)
    elif not isinstance(content, str | None):
        raise ApiError(f"{place}.content must be a string, null or a list of parts.", param=f"{place}.content")
    ready = {**message, "role": ROLES[role], "content": content}
    if "reasoning" in message:  # the newer name of some servers
        ready.setdefault("reasoning_content", message["reasoning"])
    return cast("Message", ready)
