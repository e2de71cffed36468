"""The requests of the OpenAI dialect, as far as they are served.

Clients send many fields, so unknown ones are ignored; fields that would change the answer and are not served
get a 400 that names them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from step35.serve.request_shapes import MESSAGES, PROMPTS, TOOLS

SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "logprobs_of",
)
"""Request fields that are sampling parameters of the same name."""

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class SamplingRequest(BaseModel):
    """What all generating requests of this dialect have in common."""

    model_config = ConfigDict(extra="ignore")
    unsupported: ClassVar[dict[str, str]] = {}
    """Fields that are refused when they are set, and what to do instead."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool | None = None
    logprobs_of: Literal["raw", "processed"] | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        for name, remedy in cls.unsupported.items():
            if isinstance(values, dict) and values.get(name) not in (None, False, [], {}, ""):
                raise ValueError(f"{name} is not served; {remedy}")
        return values

    def options(self) -> dict[str, Any]:
        """Return the sampling parameters that were given, by the names of `SamplingParams`."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given["top_k"] = max(given["top_k"] or 0, 0)  # some clients write -1 for "all"
        return given | {
            "stop": tuple(stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logit_bias": dict(self.logit_bias or {}),
        }


class JsonSchema(BaseModel):
    """The schema of a structured answer."""

    model_config = ConfigDict(populate_by_name=True)
    name: str = "answer"
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    """What the answer's text has to be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_given(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs the field json_schema, with the schema in json_schema.schema")
        return self


class FunctionName(BaseModel):
    """The function of a named tool choice."""

    name: str


class NamedChoice(BaseModel):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionTool(BaseModel):
    """A function of a tool."""

    model_config = ConfigDict(extra="allow")
    name: str


class ToolObject(BaseModel):
    """A tool on offer; the model sees the object as the client sent it."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: FunctionTool


class ChatRequest(SamplingRequest):
    """The body of /v1/chat/completions."""

    unsupported: ClassVar[dict[str, str]] = {
        "functions": "give tools",
        "function_call": "give tool_choice",
        "audio": "this model speaks text",
        "prediction": "leave it out",
        "web_search_options": "give a search tool in tools",
        "prompt_logprobs": "leave it out",
        "echo": "leave it out",
    }

    messages: list[dict[str, Any]] = Field(min_length=1, json_schema_extra=MESSAGES)
    tools: list[ToolObject] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    reasoning_effort: str | None = None
    thinking_budget: int | None = Field(default=None, ge=0)
    thinking: Literal["on", "off"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def thinking_enabled(self) -> bool | None:
        """Return the switch of `thinking`, or of `chat_template_kwargs.enable_thinking`; None when not given."""
        if self.thinking is not None:
            return self.thinking == "on"
        enabled = (self.chat_template_kwargs or {}).get("enable_thinking")
        return None if enabled is None else bool(enabled)


class CompletionRequest(SamplingRequest):
    """The body of /v1/completions: a text, a list of token ids, or a list of either."""

    unsupported: ClassVar[dict[str, str]] = {
        "suffix": "this model only continues texts",
        "best_of": "ask for n choices and pick one",
    }

    prompt: str | list[int] | list[str] | list[list[int]] = Field(json_schema_extra=PROMPTS)
    max_tokens: int = Field(default=16, ge=0)
    """0 only together with `echo`: the prompt is read, and nothing is generated."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = False
    """Put the prompt in front of the text, and its tokens in front of those of `logprobs`."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """The prompt's own tokens, and so many of the likeliest at each place; in vLLM's form."""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> CompletionRequest:
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs come with whole answers only; leave out stream")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs comes with whole answers only; leave out stream")
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens=0 generates nothing; give at least 1, or set echo to score the prompt")
        return self


class TokenizeRequest(BaseModel):
    """The body of /tokenize: a text, or a conversation."""

    prompt: str | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, json_schema_extra=MESSAGES)
    tools: list[dict[str, Any]] | None = Field(default=None, json_schema_extra=TOOLS)

    @model_validator(mode="after")
    def _one_is_given(self) -> TokenizeRequest:
        if sum(value is not None for value in (self.prompt, self.text, self.messages)) != 1:
            raise ValueError("give exactly one of text (or prompt) and messages")
        return self


class DetokenizeRequest(BaseModel):
    """The body of /detokenize."""

    tokens: list[int]
