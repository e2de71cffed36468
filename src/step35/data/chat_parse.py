"""Generated assistant text back to a message: reasoning, content and typed tool calls.

The inverse of `chat.render` for what follows `<think>\\n`, and lenient where models slip: a call inside the
reasoning ends it, `</parameter>`, `</function>` and `</tool_call>` may be missing, blank text may stand
between calls. Tags only count as a call where a `<function=NAME>` follows; otherwise they stay text. A text
cut off by a token limit parses too: whoever knows that it was cut decides whether to trust its last call.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from step35.api.messages import Message, ToolCall, ToolSchema

_FUNCTION = r"<function=([\w-][\w.:/-]*)>"
_CALL_IN_REASONING = re.compile(rf"<tool_call>\s*{_FUNCTION}")
_CALL = re.compile(rf"(?:<tool_call>\s*)?{_FUNCTION}")
_CALL_END = re.compile(r"\s*(?:</function>)?\s*(?:</tool_call>)?")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
# A value may quote any tag. It ends at a `</parameter>` that is followed by what may follow one; failing
# that, where the next tag of the call begins a line, or the function closes just before its call does.
_VALUE_END = re.compile(
    r"\n?</parameter>(?=\s*(?:<parameter=|</function>|</tool_call>|<tool_call>|\Z))"
    r"|\n?(?=</function>\s*(?:</tool_call>|\Z))"
    r"|\n(?=<parameter=[^>\n]+>\n|</function>\n|</tool_call>|<tool_call>\s*<function=)"
    r"|\n?\Z"
)

_KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}
_PYTHON_LITERALS = {"True": True, "False": False, "None": None}


def parse(text: str, tools: Sequence[ToolSchema] | None = None) -> Message:
    """Return the assistant message in `text` (what follows `<think>\\n`; never raises).

    Without `</think>` all of it is reasoning. Values are typed by the schemas in `tools`; a value that does
    not convert stays a string. `tool_calls` is absent when there are none.
    """
    text = text.removesuffix("<|im_end|>")
    if text.startswith("<think>"):
        text = text.removeprefix("<think>").removeprefix("\n")
    reasoning, body, closed = _split_reasoning(text)
    content, calls = _split_calls(body, tools or ())
    if not closed:
        content = re.sub(r"\n?</think>\n?", "", content, count=1)  # it came after the call that ended reasoning
    if calls and not content.strip():
        content = ""
    message = Message(role="assistant", content=content, reasoning_content=reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _split_reasoning(text: str) -> tuple[str, str, bool]:
    """Return reasoning, the rest, and whether `</think>` (not a call) ended the reasoning."""
    end = text.find("</think>")
    call = _CALL_IN_REASONING.search(text)
    if call and (end < 0 or call.start() < end):
        return text[: call.start()].removesuffix("\n"), text[call.start() :], False
    if end < 0:
        return text, "", True
    # Exactly one newline on each side is the template's; more belong to the model and must survive a replay.
    return text[:end].removesuffix("\n"), text[end + len("</think>") :].removeprefix("\n"), True


def _split_calls(body: str, tools: Sequence[ToolSchema]) -> tuple[str, list[ToolCall]]:
    """Return the text outside of calls, and the calls."""
    content, calls, position = "", list[ToolCall](), 0
    while match := _CALL.search(body, position):
        between = body[position : match.start()]
        content += between if between.strip() or not calls else ""
        name = match[1]
        arguments, position = _read_arguments(body, match.end(), _properties(name, tools))
        call = ToolCall(id=f"call_{len(calls)}", type="function", function={"name": name, "arguments": arguments})
        calls.append(call)
    rest = body[position:]
    return content + (rest if rest.strip() or not calls else ""), calls


def _read_arguments(body: str, position: int, properties: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Read parameters from `position` on; return them and the position behind the call."""
    arguments: dict[str, Any] = {}
    while match := _PARAMETER.match(body, position):
        # From one character back, so that an empty value may share its only newline with the tag after it.
        start = match.end()
        end, position = _next_span(_VALUE_END, body, start - match[0].endswith("\n"))
        arguments[match[1]] = _typed(body[start : max(start, end)], properties.get(match[1]))
    return arguments, _next_span(_CALL_END, body, position)[1]


def _next_span(pattern: re.Pattern[str], text: str, position: int) -> tuple[int, int]:
    """Return the span of the next match; the patterns used here match at the text's end at the latest."""
    match = pattern.search(text, position)
    return match.span() if match else (len(text), len(text))


def _properties(name: str, tools: Sequence[ToolSchema]) -> dict[str, Any]:
    """Return the parameter schemas of the tool `name`; empty when unknown."""
    for tool in tools:
        function = tool.get("function") or tool
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties")
            return properties if isinstance(properties, dict) else {}
    return {}


def _typed(text: str, schema: Any) -> Any:
    """Convert `text` to a type that `schema` declares, or return it unchanged."""
    declared = _declared_types(schema)
    kinds = tuple(kind for name in declared for kind in _KINDS.get(name, ()))
    # Without a declared type, or where a string is welcome, only a declared null can change the text.
    if not kinds or "string" in declared:
        return None if "null" in declared and text.strip() in ("None", "null") else text
    try:
        value = _read_value(text.strip())
    except (ValueError, RecursionError):
        return text
    if value is None:  # an optional parameter that the template printed as None
        return None
    if isinstance(value, bool) and bool not in kinds:  # True is an int to Python
        return text
    if isinstance(value, float) and float not in kinds:
        return int(value) if int in kinds and value.is_integer() else text
    return value if isinstance(value, kinds) else text


def _read_value(text: str) -> Any:
    if text in _PYTHON_LITERALS:
        return _PYTHON_LITERALS[text]
    value = json.loads(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a number that JSON can carry")
    return value


def _declared_types(schema: Any) -> set[str]:
    """Collect the type names of a parameter schema, alternatives included."""
    if not isinstance(schema, dict):
        return set()
    declared = schema.get("type")
    names = {name for name in (declared if isinstance(declared, list) else [declared]) if isinstance(name, str)}
    for alternative in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        names |= _declared_types(alternative)
    return names
