"""The request of OpenAI's Responses dialect, without stored state, and its items in the chat format's terms."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from step35.serve.errors import ApiError
from step35.serve.messages import content_text
from step35.serve.request_shapes import FLAT_TOOLS, ITEMS

PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text")


class TextFormat(BaseModel):
    """What the answer's text has to be."""

    model_config = ConfigDict(populate_by_name=True)
    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(BaseModel):
    """The form of the answer's text."""

    format: TextFormat = TextFormat()


class ReasoningOptions(BaseModel):
    """How much to think."""

    effort: str | None = None


class NamedTool(BaseModel):
    """The one function that has to be called."""

    type: Literal["function"]
    name: str


class ResponsesRequest(BaseModel):
    """The body of /v1/responses."""

    model_config = ConfigDict(extra="ignore")
    unsupported: ClassVar[dict[str, str]] = {
        "previous_response_id": "nothing is stored here; send the whole conversation in input",
        "conversation": "nothing is stored here; send the whole conversation in input",
        "background": "wait for the answer, or stream it",
        "prompt": "give instructions and input",
    }

    model: str | None = None
    input: str | list[dict[str, Any]] = Field(json_schema_extra=ITEMS)
    instructions: str | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list, json_schema_extra=FLAT_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool | None = None
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        for name, remedy in cls.unsupported.items():
            if isinstance(values, dict) and values.get(name):
                raise ValueError(f"{name} is not served; {remedy}")
        return values

    def chat_tools(self) -> list[dict[str, Any]]:
        """Return the tools as the model was trained to read them."""
        for tool in self.tools:
            if tool.get("type") != "function" or "name" not in tool:
                raise ApiError(f"tool type {tool.get('type')!r} is not served; give functions.", param="tools")
        return [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in self.tools]

    def chat_messages(self) -> list[dict[str, Any]]:
        """Return the conversation as the chat dialect says it."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            _add(messages, item)
        return messages


def _add(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Append an item; reasoning, text and calls of one assistant turn become one message."""
    kind = item.get("type", "message")
    if kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"))})
    elif kind == "reasoning":
        turn = _assistant(messages)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + _text(item.get("content"))
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        calls = _assistant(messages).setdefault("tool_calls", [])
        calls.append({"id": item.get("call_id"), "type": "function", "function": function})
    elif kind == "message" and item.get("role") == "assistant":
        turn = _assistant(messages)
        turn["content"] = (turn.get("content") or "") + _text(item.get("content"))
    elif kind == "message":
        messages.append({"role": item.get("role"), "content": _text(item.get("content"))})
    else:
        raise ApiError(f"an input item has type {kind!r}, which is not served.", param="input")


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant turn that is being put together, a new one if need be."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: Any) -> str:
    return content_text(content, "input", PARTS)
