"""What the loosely typed parts of requests look like, for the OpenAPI document.

Messages, blocks, items and tools are read as plain objects, so that fields of newer clients do no harm, and checked
where they are used, with errors that name the place. These shapes say what is expected there.
"""

from __future__ import annotations

from typing import Any

Shape = dict[str, Any]
STRING: Shape = {"type": "string"}
OBJECT: Shape = {"type": "object"}


def _object(required: list[str], **properties: Shape) -> Shape:
    return {"type": "object", "required": required, "properties": properties}


def _list(*shapes: Shape, least: int = 0) -> Shape:
    return {"type": "array", "minItems": least, "items": shapes[0] if len(shapes) == 1 else {"anyOf": list(shapes)}}


def _any(*shapes: Shape) -> Shape:
    return {"anyOf": list(shapes)}


def _kind(name: str) -> Shape:
    return {"const": name}


_NAME: Shape = {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_-]{0,63}$"}
_TEXT_PART = _object(["type", "text"], type=_kind("text"), text=STRING)
_CALL = _object(
    ["function"],
    id=STRING,
    type=_kind("function"),
    function=_object(["name", "arguments"], name=_NAME, arguments=_any(OBJECT, {"const": "{}"})),
)
_MESSAGE = _object(
    ["role"],
    role={"enum": ["system", "developer", "user", "assistant", "tool"]},
    content=_any(STRING, {"type": "null"}, _list(_TEXT_PART)),
    reasoning_content=_any(STRING, {"type": "null"}),
    tool_calls=_any({"type": "null"}, _list(_CALL)),
    tool_call_id=STRING,
)
_IDS = _list({"type": "integer", "minimum": 0}, least=1)
_TEXT: Shape = {"type": "string", "minLength": 1}
_PARAMETERS = _object([], type=_kind("object"), properties={"type": "object", "additionalProperties": OBJECT})
_FUNCTION = _object(["name"], name=_NAME, description=STRING, parameters=_PARAMETERS)
_BLOCKS = (
    _TEXT_PART,
    _object(["type", "thinking"], type=_kind("thinking"), thinking=STRING),
    _object(["type", "id", "name", "input"], type=_kind("tool_use"), id=STRING, name=_NAME, input=OBJECT),
    _object(
        ["type", "tool_use_id"],
        type=_kind("tool_result"),
        tool_use_id=STRING,
        content=_any(STRING, _list(_TEXT_PART)),
    ),
)
_ITEM_PART = _object(["type", "text"], type={"enum": ["input_text", "output_text"]}, text=STRING)
_ITEMS = (
    _object(
        ["role", "content"],
        type=_kind("message"),
        role={"enum": ["system", "developer", "user", "assistant"]},
        content=_any(STRING, _list(_ITEM_PART)),
    ),
    _object(
        ["type", "call_id", "name", "arguments"],
        type=_kind("function_call"),
        call_id=STRING,
        name=_NAME,
        arguments={"const": "{}"},
    ),
    _object(["type", "call_id", "output"], type=_kind("function_call_output"), call_id=STRING, output=STRING),
)

MESSAGES: Shape = {"items": _MESSAGE}
"""The messages of a chat."""
PROMPTS: Shape = _any(_TEXT, _IDS, _list(_TEXT, least=1), _list(_IDS, least=1))
"""The prompt of a completion."""
TOOLS: Shape = {"items": _object(["type", "function"], type=_kind("function"), function=_FUNCTION)}
"""Tools in the chat dialect."""
FLAT_TOOLS: Shape = {
    "items": _object(["type", "name"], type=_kind("function"), name=_NAME, description=STRING, parameters=_PARAMETERS)
}
"""Tools in the Responses dialect."""
ITEMS: Shape = _any(STRING, _list(*_ITEMS))
"""The input of a response."""
BLOCKS: Shape = _any(STRING, _list(*_BLOCKS))
"""The content of an Anthropic message."""
ANTHROPIC_TOOLS: Shape = {"items": _object(["name", "input_schema"], name=_NAME, input_schema=_PARAMETERS)}
"""Tools in the Anthropic dialect."""
