"""Generated assistant text to reasoning, content and typed tool calls, while it is being generated.

`TurnParser` takes the text in pieces, cut anywhere, and says what each piece settles; `chat_parse.parse` feeds
it a whole turn. It is the inverse of `chat.render` for what follows `<think>\\n`, and lenient where models slip:
a call inside the reasoning ends it, `</parameter>`, `</function>` and `</tool_call>` may be missing, blank text
may stand between calls. Tags only count as a call where a `<function=NAME>` follows; otherwise they stay text.

Every step moves the settled text out of `_unread` and leaves only what may yet turn out to be a tag. Names, keys
and the blanks inside tags are bounded, so what is left is short, and the work is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from step35.api.messages import Message, ToolCall, ToolSchema
from step35.data.chat_values import properties, typed


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the text outside of reasoning and calls."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call has begun; `index` counts the calls of the turn."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallEnd:
    """A call is complete; only here are its arguments given."""

    index: int
    name: str
    arguments: dict[str, Any]


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallEnd

_END_OF_TURN = "<|im_end|>"
_GAP = r"\s{0,255}"
_NAME = r"[\w-][\w.:/-]{0,255}"
_KEY = r"[^<>\n]{1,256}"


def _begun(*tags: str) -> str:
    """Return a pattern for the tags and every beginning of them."""
    patterns = []
    for tag in tags:
        pattern = ""
        for character in reversed(tag[1:]):
            pattern = f"(?:{re.escape(character)}{pattern})?"
        patterns.append(re.escape(tag[0]) + pattern)
    return f"(?:{'|'.join(patterns)})"


_FUNCTION = rf"<function=(?P<name>{_NAME})>"
_FUNCTION_BEGUN = rf"(?:{_begun('<function=')}|<function={_NAME})"
_WRAPPED_BEGUN = rf"(?:{_begun('<tool_call>')}|<tool_call>{_GAP}{_FUNCTION_BEGUN}?)"
_CALL = rf"(?:<tool_call>{_GAP})?{_FUNCTION}"
_CALL_BEGUN = rf"(?:{_WRAPPED_BEGUN}|{_FUNCTION_BEGUN}|{_begun(_END_OF_TURN)})"

# Pairs of patterns: what ends a stretch of text, and the end of a text that may yet become that. Exactly one
# newline on each side of `</think>` is the template's; more belong to the model and must survive a replay.
_REASONING = (
    re.compile(rf"\n?(?:</think>|(?=<tool_call>{_GAP}{_FUNCTION}))"),
    re.compile(rf"(?:\n?(?:{_begun('</think>')}|{_WRAPPED_BEGUN})|\n|{_begun(_END_OF_TURN)})\Z"),
)
_CONTENT = (re.compile(_CALL), re.compile(rf"{_CALL_BEGUN}\Z"))
_CONTENT_BEFORE_THINK_END = (
    re.compile(rf"\n?</think>|{_CALL}"),
    re.compile(rf"(?:\n?{_begun('</think>')}|\n|{_CALL_BEGUN})\Z"),
)

# The same where calls are no calls but text.
_REASONING_ALONE = (
    re.compile(r"\n?</think>"),
    re.compile(rf"(?:\n?{_begun('</think>')}|\n|{_begun(_END_OF_TURN)})\Z"),
)
_CONTENT_ALONE = (re.compile(r"(?!)"), re.compile(rf"{_begun(_END_OF_TURN)}\Z"))

_PARAMETER = re.compile(rf"<parameter=({_KEY})>")
_PARAMETER_BEGUN = re.compile(rf"(?:{_begun('<parameter=')}|<parameter={_KEY})?")


def _value_end(or_end_of_text: str) -> str:
    """Return a pattern for the end of a value, which may quote any tag.

    It ends at a `</parameter>` that is followed by what may follow one; failing that, where the next tag of the
    call begins a line, or the function closes just before its call does.
    """
    return (
        rf"\n?</parameter>(?={_GAP}(?:<parameter=|</function>|</tool_call>|<tool_call>{or_end_of_text}))"
        rf"|\n?(?=</function>{_GAP}(?:</tool_call>{or_end_of_text}))"
        rf"|\n(?=<parameter={_KEY}>\n|</function>\n|</tool_call>|<tool_call>{_GAP}<function=)"
    )


_VALUE = (
    re.compile(_value_end("")),
    re.compile(
        rf"\n?(?:(?:</parameter>|</function>|<tool_call>){_GAP})?"
        rf"(?:{_begun('<parameter=', '</parameter>', '</function>', '<function=', '<tool_call>', '</tool_call>')}"
        rf"|{_begun(_END_OF_TURN)}|<parameter={_KEY}>?)?\Z"
    ),
)
_LAST_VALUE = (re.compile(_value_end(r"|\Z") + r"|\n?\Z"), _VALUE[1])


class TurnParser:
    """A state machine over the text of one assistant turn, special tokens included as their text.

    `thinking=False` is for a prompt that has closed the think block: the text starts as content. `calls=False` is
    for a turn that may call nothing: what looks like a call stays text. Joined, the events of `feed` and `finish`
    are the same however the text is cut. Nothing raises on any text.
    `reasoning_closed` tells whether `</think>` or a call has ended the reasoning.
    """

    def __init__(self, tools: Sequence[ToolSchema] | None = None, *, thinking: bool = True, calls: bool = True) -> None:
        self.reasoning_closed = not thinking
        self._reasoning_tags, self._content_tags = (
            (_REASONING, _CONTENT) if calls else (_REASONING_ALONE, _CONTENT_ALONE)
        )
        self._tools = tools or ()
        self._read: Callable[[], bool] = self._read_opening if thinking else self._read_content
        self._unread = ""
        self._finished = False
        self._skip_newline = False
        self._think_end_is_due = False  # a call ended the reasoning; its `</think>` may come later
        self._events: list[Event] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._blanks: list[str] = []  # blank text since the last call: content only if text follows
        self._is_blank = True  # whether there has been no other text since the last call
        self._calls: list[ToolCall] = []
        self._name, self._key = "", ""
        self._arguments: dict[str, Any] = {}
        self._value: list[str] = []

    @property
    def message(self) -> Message:
        """The assistant message so far; after `finish`, of the whole text. No `tool_calls` when there are none."""
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        message = Message(role="assistant", content=content, reasoning_content=reasoning)
        if self._calls:
            message["tool_calls"] = list(self._calls)
        return message

    def feed(self, piece: str) -> list[Event]:
        """Return what is certain now that `piece` has followed the text so far."""
        self._unread += piece
        return self._advance()

    def finish(self) -> list[Event]:
        """Return the rest: the text has ended, by `<|im_end|>` or cut off anywhere."""
        self._unread = self._unread.removesuffix(_END_OF_TURN)
        self._finished = True
        self._advance()
        if not self._calls:
            self._emit_content("".join(self._blanks))
        self._blanks.clear()
        return self._take_events()

    def _advance(self) -> list[Event]:
        """Read until more text is needed."""
        reading = True
        while reading:
            if self._skip_newline and self._unread:
                self._unread = self._unread.removeprefix("\n")
                self._skip_newline = False
            reading = self._read()
        return [] if self._finished else self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # The states. Each reads what it can and returns whether the next state can go on with the rest.

    def _read_opening(self) -> bool:
        """Step over a `<think>` that repeats the prompt's."""
        if self._may_become("<think>"):
            return False
        self._skip_newline = self._unread.startswith("<think>")
        self._unread = self._unread.removeprefix("<think>")
        self._read = self._read_reasoning
        return True

    def _read_reasoning(self) -> bool:
        text, end = self._cut(self._reasoning_tags)
        if text:
            self._reasoning.append(text)
            self._events.append(ReasoningDelta(text))
        if end is None:
            return False
        self.reasoning_closed = True
        self._skip_newline = "</think>" in end[0]
        self._think_end_is_due = not self._skip_newline
        self._read = self._read_content
        return True

    def _read_content(self) -> bool:
        text, end = self._cut(_CONTENT_BEFORE_THINK_END if self._think_end_is_due else self._content_tags)
        self._add_content(text)
        if end is None:
            return False
        if end["name"] is None:
            self._think_end_is_due = False
            self._skip_newline = True
        else:
            self._start_call(end["name"])
        return True

    def _read_parameter(self) -> bool:
        """Step over a `<parameter=KEY>`, or go on to the end of the call."""
        self._unread = self._unread.lstrip()
        if match := _PARAMETER.match(self._unread):
            self._key = match[1]
            self._unread = self._unread[match.end() :]
            self._read = self._read_value
        elif not self._finished and _PARAMETER_BEGUN.fullmatch(self._unread):
            return False
        else:
            self._read = self._read_function_end
        return True

    def _read_value(self) -> bool:
        text, end = self._cut(_LAST_VALUE if self._finished else _VALUE)
        self._value.append(text)
        if end is None:
            return False
        # The tag's newline is left in the value until here: an empty value may share it with the tag after it.
        value = "".join(self._value).removeprefix("\n")
        self._value.clear()
        self._arguments[self._key] = typed(value, properties(self._name, self._tools).get(self._key))
        self._read = self._read_parameter
        return True

    def _read_function_end(self) -> bool:
        self._unread = self._unread.lstrip()
        if self._may_become("</function>"):
            return False
        self._unread = self._unread.removeprefix("</function>")
        self._read = self._read_call_end
        return True

    def _read_call_end(self) -> bool:
        self._unread = self._unread.lstrip()
        if self._may_become("</tool_call>"):
            return False
        self._unread = self._unread.removeprefix("</tool_call>")
        self._end_call()
        return True

    def _may_become(self, tag: str) -> bool:
        """Return whether the text is a beginning of `tag` and may still grow to it."""
        return not self._finished and len(self._unread) < len(tag) and tag.startswith(self._unread)

    def _cut(self, patterns: tuple[re.Pattern[str], re.Pattern[str]]) -> tuple[str, re.Match[str] | None]:
        """Take the text before the first tag, and the tag; without one, the text that is certainly before it."""
        tag, begun = patterns
        end = tag.search(self._unread)
        if end is None:
            held = None if self._finished else begun.search(self._unread)
            until = resume = held.start() if held else len(self._unread)
        else:
            until, resume = end.span()
        text, self._unread = self._unread[:until], self._unread[resume:]
        return text, end

    def _add_content(self, text: str) -> None:
        """Emit `text`, but keep blank text back until other text follows: blanks around calls are no content."""
        if not text:
            return
        if self._is_blank:
            self._blanks.append(text)
            if text.isspace():
                return
            text = "".join(self._blanks)
            self._blanks.clear()
            self._is_blank = False
        self._emit_content(text)

    def _emit_content(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._events.append(ContentDelta(text))

    def _start_call(self, name: str) -> None:
        self._name, self._arguments = name, {}
        self._blanks.clear()
        self._is_blank = True
        self._events.append(ToolCallStart(len(self._calls), name))
        self._read = self._read_parameter

    def _end_call(self) -> None:
        index, name, arguments = len(self._calls), self._name, self._arguments
        function: Any = {"name": name, "arguments": arguments}
        self._calls.append(ToolCall(id=f"call_{index}", type="function", function=function))
        self._events.append(ToolCallEnd(index, name, arguments))
        self._read = self._read_content
