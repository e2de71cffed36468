"""The requests of the Anthropic dialect, and how their messages and tools are said in the chat format's terms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from step35.api.messages import ToolSchema
from step35.serve.errors import ApiError
from step35.serve.messages import content_text
from step35.serve.request_shapes import ANTHROPIC_TOOLS, BLOCKS

Content = str | list[dict[str, Any]]


class TurnMessage(BaseModel):
    """A turn: text, or blocks."""

    role: Literal["user", "assistant"]
    content: Content = Field(json_schema_extra=BLOCKS)


class ThinkingChoice(BaseModel):
    """Whether to think, and how much for each user query."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=0)


class ToolChoiceObject(BaseModel):
    """What has to be called, if anything."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class OutputFormat(BaseModel):
    """A schema that the answer's text has to fit."""

    model_config = ConfigDict(populate_by_name=True)
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    """The form of the answer."""

    format: OutputFormat | None = None
    effort: str | None = None


class CountRequest(BaseModel):
    """The body of /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None
    system: Content = ""
    messages: list[TurnMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] = Field(default_factory=list, json_schema_extra=ANTHROPIC_TOOLS)
    tool_choice: ToolChoiceObject | None = None
    thinking: ThinkingChoice | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest):
    """The body of /v1/messages. Without `thinking`, the turn thinks as the server's settings say."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[str] = Field(default_factory=list)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


def openai_messages(body: CountRequest) -> list[dict[str, Any]]:
    """Return the conversation as the OpenAI dialect says it."""
    system = body.system if isinstance(body.system, str) else "\n\n".join(_text([block]) for block in body.system)
    messages = [{"role": "system", "content": system}] if system else []
    for message in body.messages:
        blocks = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content
        messages += [_assistant(blocks)] if message.role == "assistant" else list(_user(blocks))
    return messages


def openai_tools(tools: Iterable[dict[str, Any]]) -> list[ToolSchema]:
    """Return the tools as the model was trained to read them."""
    found = []
    for tool in tools:
        if tool.get("type", "custom") != "custom" or "name" not in tool:
            raise ApiError(f"tool {tool.get('type')!r} runs on Anthropic's servers only; give tools with input_schema.")
        function = {"name": tool["name"], "description": tool.get("description", "")}
        found.append({"type": "function", "function": function | {"parameters": tool.get("input_schema") or {}}})
    return found


def _user(blocks: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yield the tool results as messages of their own, then the text if there is any."""
    text = [_text([block]) for block in blocks if block.get("type") != "tool_result"]
    for block in blocks:
        if block.get("type") == "tool_result":
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id", ""), "content": _text(block.get("content"))}
    if text:
        yield {"role": "user", "content": "\n".join(text)}


def _assistant(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    for block in blocks:
        if block.get("type") == "thinking":
            message["reasoning_content"] += content_text(block.get("thinking"), "thinking")
        elif block.get("type") == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            message["tool_calls"].append({"id": block.get("id", ""), "type": "function", "function": function})
        elif block.get("type") != "redacted_thinking":
            message["content"] += _text([block])
    return message


def _text(content: Any) -> str:
    return content_text(content, "content", ("text",))
