"""Values of tool arguments: to the text of a `<parameter>`, and back by the schema that declares their type."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from step35.api.messages import ToolSchema

_KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}
_PYTHON_LITERALS = {"True": True, "False": False, "None": None}


def value_text(value: Any) -> str:
    """JSON for containers, Python's `str` for the rest: so true is `True` on its own, `true` in a list."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def properties(name: str, tools: Sequence[ToolSchema]) -> dict[str, Any]:
    """Return the parameter schemas of the tool `name`; empty when unknown."""
    for tool in tools:
        function = tool.get("function") or tool
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties")
            return properties if isinstance(properties, dict) else {}
    return {}


def typed(text: str, schema: Any) -> Any:
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
    for key in ("anyOf", "oneOf"):
        alternatives = schema.get(key)
        for alternative in alternatives if isinstance(alternatives, list) else ():
            names |= _declared_types(alternative)
    return names
