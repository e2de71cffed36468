"""What the routes answer, for the OpenAPI document: clients and tests read it, answers are not built from it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
"""A server-sent event, one of many."""
Responses = dict[int | str, dict[str, Any]]
"""What FastAPI takes as `responses`."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """A failure in OpenAI's shape."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorAnswer(BaseModel):
    """A failure in Anthropic's shape."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class CallFunction(BaseModel):
    """The function of a call; `arguments` is JSON text."""

    name: str
    arguments: str


class Call(BaseModel):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CallFunction


class ChatMessage(BaseModel):
    """An assistant turn."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    tool_calls: list[Call] = []


class ChatChoice(BaseModel):
    """One of the turns that were asked for."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    token_ids: list[int] = []


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = []


class TextChoice(BaseModel):
    """One of the texts that were asked for."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    prompt_logprobs: list[dict[str, Any] | None] = []


class TextCompletion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ResponseObject(BaseModel):
    """The answer of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class MessageUsage(BaseModel):
    """Tokens read and written, in Anthropic's terms."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessageObject(BaseModel):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """The answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int | None


class Text(BaseModel):
    """The answer of /detokenize."""

    text: str
    prompt: str


class Health(BaseModel):
    """The answer of /health."""

    status: Literal["ok", "draining"]
    running: int


def answers(model: type[BaseModel], *, stream: bool = False, errors: type[BaseModel] = ErrorAnswer) -> Responses:
    """Return what a route may answer: `model`, or events if it streams, or an error."""
    good: dict[str, Any] = {"model": model, "description": "The answer."}
    if stream:
        good["content"] = {"text/event-stream": {"schema": EVENT}}
    refused = {"model": errors, "description": "The request cannot be served as it is."}
    failed = {"model": errors, "description": "The server is ending, or failed, or ran out of time."}
    return {200: good, "4XX": refused, "5XX": failed}
