"""What the tests of the chat format share: the released template's renderings, and a tool with every type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIXTURES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "chat_renderings.json").read_text(encoding="utf-8")
)
TYPES = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "flag": {"type": "boolean"},
    "table": {"type": "object"},
    "rows": {"type": "array"},
    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": TYPES}}}]
