"""The chat format: messages to text (`render`), to training pieces (`segments`) and to token ids (`encode`).

Byte for byte what the released model's template prints; `assets/chat_template.jinja` says the same to other
programs. `parse` (from `chat_parse`) goes the other way. Reasoning is printed only after the last real user
query, so a new query erases all earlier thinking. Text in messages is not escaped: a message that contains
`<|im_end|>` encodes to that token, as with the released template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from step35.api.messages import Message, ToolCall, ToolSchema
from step35.data.chat_parse import parse
from step35.data.chat_values import value_text
from step35.errors import DataError

if TYPE_CHECKING:
    from step35.data.tokenizer import Tokenizer

__all__ = [
    "GENERATION_PROMPT",
    "chat_template",
    "continuation",
    "encode",
    "encode_prompt",
    "parse",
    "read_call",
    "render",
    "segments",
]

Segment = tuple[str, bool]
"""A piece of text, and whether the policy generates it."""

GENERATION_PROMPT = "<|im_start|>assistant\n<think>\n"

# The wording of the next two is a protocol constant: the released model was trained on it.
_TOOLS_HEAD = "# Tools\n\nYou have access to the following functions in JSONSchema format:\n\n<tools>"
_TOOLS_TAIL = """
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...>
...
</function> block must be nested within <tool_call>
...
</tool_call> XML tags
- Required parameters MUST be specified
</IMPORTANT><|im_end|>
"""


def chat_template() -> str:
    """Return the jinja template that prints the same bytes (needs `trim_blocks` and `lstrip_blocks`)."""
    return files("step35").joinpath("assets/chat_template.jinja").read_text(encoding="utf-8")


def render(
    messages: Sequence[Message],
    tools: Sequence[ToolSchema] | None = None,
    add_generation_prompt: bool = False,
    bos_token: str = "",
) -> str:
    """Return the conversation as text; raise `DataError` on unknown roles, unreadable contents or calls."""
    pieces = segments(messages, tools, bos_token, add_generation_prompt=add_generation_prompt)
    return "".join(text for text, _ in pieces)


def segments(
    messages: Sequence[Message],
    tools: Sequence[ToolSchema] | None = None,
    bos_token: str = "",
    *,
    add_generation_prompt: bool = False,
) -> list[Segment]:
    """Cut the rendered text into pieces that alternate between given (False) and generated (True).

    A generated piece runs from behind `<think>\\n` to `<|im_end|>` inclusive. Assistant turns before the last
    user query are given text: they are printed without the thinking that led to them. So is a turn whose `loss_mask`
    is 0.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f"messages[{index}] is {message!r:.80}; a message is a dictionary with 'role' and 'content'."
            )
    pieces = [(bos_token, False), *_turns(messages, tools)]
    if add_generation_prompt:
        pieces.append((GENERATION_PROMPT, False))
    merged = [("".join(text for text, _ in run), mark) for mark, run in groupby(pieces, key=itemgetter(1))]
    return [piece for piece in merged if piece[0]]


def encode(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[ToolSchema] | None = None
) -> tuple[list[int], list[bool]]:
    """Return the ids (BOS first) and the loss mask, both of length T.

    Each piece is encoded on its own, so that a token never spans what is given and what is generated.
    """
    return _encode_pieces(tokenizer, segments(messages, tools))


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[ToolSchema] | None = None
) -> list[int]:
    """Return the ids to continue from: exactly a prefix of `encode` of the conversation one turn longer."""
    return _encode_pieces(tokenizer, segments(messages, tools, add_generation_prompt=True))[0]


def continuation(tool_messages: Sequence[Message]) -> str:
    """Return the text between the `<|im_end|>` of a generated turn and the next token to generate.

    Its ids, appended to the sampled ids, give what `encode` gives, without re-tokenising the samples.
    """
    for message in tool_messages:
        if message.get("role") != "tool":
            raise DataError(
                f"continuation got a message of role '{message.get('role')}'; only 'tool' messages keep the "
                "thinking before them. Encode the whole conversation again with encode_prompt."
            )
    return "\n" + render(tool_messages, add_generation_prompt=True)


def read_call(call: ToolCall) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a nested or flat call; raise `DataError` when they cannot be read."""
    function: Any = call.get("function") or call
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):  # API clients send JSON text
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise DataError(
                f"arguments of call '{name}' are not JSON ({error}): {arguments!r}; send an object."
            ) from None
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise DataError(f"call {call!r} needs a name and arguments that are an object or its JSON text.")
    return name, arguments


def _encode_pieces(tokenizer: Tokenizer, pieces: list[Segment]) -> tuple[list[int], list[bool]]:
    ids, mask = [tokenizer.bos_id], [False]
    for text, generated in pieces:
        piece = tokenizer.encode(text)
        ids += piece
        mask += [generated] * len(piece)
    return ids, mask


def _turns(messages: Sequence[Message], tools: Sequence[ToolSchema] | None) -> Iterator[Segment]:
    """Yield the pieces of every turn in order."""
    last_query = _last_query(messages)
    if tools:
        yield _tools_turn(messages, tools), False
    for index, message in enumerate(messages):
        role, content = message.get("role"), _text(message.get("content"))
        if role == "system":
            if index > 0 or not tools:  # else it has become part of the tools turn
                word = "observation" if index > 0 and message.get("name") == "observation" else "system"
                yield f"<|im_start|>{word}\n{content}<|im_end|>\n", False
        elif role == "user":
            yield f"<|im_start|>user\n{content}<|im_end|>\n", False
        elif role == "assistant":
            yield from _assistant_turn(message, content, thinking=last_query is not None and index > last_query)
        elif role == "tool":
            first = index == 0 or messages[index - 1].get("role") != "tool"
            last = index + 1 == len(messages) or messages[index + 1].get("role") != "tool"
            opening, closing = "<|im_start|>tool_response\n" * first, "<|im_end|>\n" * last
            yield f"{opening}<tool_response>{content}</tool_response>{closing}", False
        else:
            raise DataError(f"messages[{index}] has role '{role}'; roles are system, user, assistant and tool.")


def _tools_turn(messages: Sequence[Message], tools: Sequence[ToolSchema]) -> str:
    system = ""
    if messages and messages[0].get("role") == "system":
        system = _text(messages[0].get("content")) + "\n\n"
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return f"<|im_start|>system\n{system}{_TOOLS_HEAD}{lines}{_TOOLS_TAIL}"


def _last_query(messages: Sequence[Message]) -> int | None:
    """Return the index of the last user message that is not a wrapped tool response."""
    for index in reversed(range(len(messages))):
        if messages[index].get("role") == "user":
            text = _text(messages[index].get("content"))
            if not (text.startswith("<tool_response>") and text.endswith("</tool_response>")):
                return index
    return None


def _assistant_turn(message: Message, content: str, *, thinking: bool) -> Iterator[Segment]:
    reasoning = message.get("reasoning_content")
    if not isinstance(reasoning, str):
        reasoning = ""
        if "</think>" in content:
            reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
    answer = content + "".join(map(_call_text, message.get("tool_calls") or ())) + "<|im_end|>"
    if thinking:
        # Explicit reasoning is not trimmed: its own trailing newline would show as a blank line.
        yield GENERATION_PROMPT, False
        yield f"{reasoning}\n</think>\n{answer}", message.get("loss_mask") != 0
        yield "\n", False
    else:
        yield f"<|im_start|>assistant\n{answer}\n", False


def _call_text(call: ToolCall) -> str:
    name, arguments = read_call(call)
    parameters = "".join(f"<parameter={key}>\n{value_text(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def _text(content: Any) -> str:
    """Flatten a content: a string, None, one part, or a list of parts with `text` or `value`."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        return "".join(map(_text, content))
    if isinstance(content, dict):
        for key in ("value", "text"):
            if isinstance(content.get(key), str):
                return str(content[key])
        if str(content.get("type")).startswith("image"):
            return "<im_patch>"
    raise DataError(
        f"content {content!r} is unreadable; give a string, None, or parts with 'text', 'value' or an image "
        "as their type."
    )
