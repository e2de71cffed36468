"""The output items of OpenAI's Responses dialect, built event by event: reasoning, a message, function calls."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from step35.data.chat_stream import ContentDelta, Event, ReasoningDelta, ToolCallStart

Line = dict[str, Any]
PARTS = {"reasoning": "reasoning_text", "message": "output_text"}
"""Type of the one content part of an item, which also names its delta and done events."""


class Items:
    """Turns the events of a turn into items that open and close one after the other; `output` holds them."""

    def __init__(self) -> None:
        self.output: list[Line] = []
        self.open = False

    def take(self, event: Event) -> Iterator[Line]:
        """Yield what one event brings to the stream."""
        if isinstance(event, ReasoningDelta):
            yield from self._text("reasoning", event.text)
        elif isinstance(event, ContentDelta):
            yield from self._text("message", event.text)
        elif isinstance(event, ToolCallStart):
            call = {"call_id": f"call_{uuid.uuid4().hex[:24]}", "name": event.name, "arguments": ""}
            yield from self._begin("function_call", "fc", call)
        else:
            item = self.output[-1]
            item["arguments"] = json.dumps(event.arguments, ensure_ascii=False)
            yield self._line("function_call_arguments.delta", delta=item["arguments"])
            yield self._line("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
            yield from self.close()

    def close(self, status: str = "completed") -> Iterator[Line]:
        """Yield the end of the open item, if there is one."""
        if not self.open:
            return
        self.open = False
        item = self.output[-1]
        item["status"] = status
        if kind := PARTS.get(item["type"]):
            part = item["content"][0]
            yield self._line(f"{kind}.done", content_index=0, text=part["text"], **_logprobs(kind))
            yield self._line("content_part.done", content_index=0, part=dict(part))
        yield {"type": "response.output_item.done", "output_index": len(self.output) - 1, "item": item}

    def _text(self, kind: str, text: str) -> Iterator[Line]:
        part = PARTS[kind]
        if not self.open or self.output[-1]["type"] != kind:
            fields: Line = {"content": [], "role": "assistant"} if kind == "message" else {"content": [], "summary": []}
            yield from self._begin(kind, "msg" if kind == "message" else "rs", fields)
            empty: Line = {"type": part, "text": ""} | ({"annotations": []} if kind == "message" else {})
            yield self._line("content_part.added", content_index=0, part=dict(empty))
            self.output[-1]["content"].append(empty)
        self.output[-1]["content"][0]["text"] += text
        yield self._line(f"{part}.delta", content_index=0, delta=text, **_logprobs(part))

    def _begin(self, kind: str, prefix: str, fields: Line) -> Iterator[Line]:
        yield from self.close()
        self.open = True
        item = {"id": f"{prefix}_{uuid.uuid4().hex[:24]}", "type": kind, "status": "in_progress", **fields}
        self.output.append(item)
        shown = json.loads(json.dumps(item))
        yield {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": shown}

    def _line(self, kind: str, **fields: Any) -> Line:
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        return {"type": f"response.{kind}", **place, **fields}


def _logprobs(part: str) -> Line:
    """Text events have this field in the dialect's schema; it is not served."""
    return {"logprobs": []} if part == "output_text" else {}
