from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from chat_cases import FIXTURES, TOOLS
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.data import chat
from step35.data.chat_parse import parse
from step35.data.chat_stream import ContentDelta, Event, ReasoningDelta, ToolCallEnd, ToolCallStart, TurnParser

QUESTION: Any = {"role": "user", "content": "q"}


def call(**arguments: Any) -> str:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function=f>\n{values}</function>\n</tool_call>"


def message_of(reasoning: str, content: str, arguments: list[dict[str, Any]]) -> Any:
    message: Any = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    if arguments:
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": {"name": "f", "arguments": one}}
            for n, one in enumerate(arguments)
        ]
    return message


def expect(text: str, reasoning: str, content: str, *arguments: dict[str, Any]) -> tuple[str, Any]:
    """Return a text and the message that it holds."""
    return text, message_of(reasoning, content, list(arguments))


CALL = call(text="v")
V = {"text": "v"}
MENTIONS = "say <tool_call>, </tool_call>, <function= f>, </function>, <parameter=x> or <think> freely, a<b"
CALL_LIKE = MENTIONS + " <function=f> <tool_call>\n"
QUOTING = MENTIONS + " </parameter> </think>"
UNCLOSED = "<tool_call>\n<function=f>\n<parameter=text>\n<parameter=count>\n1\n</function>\n</tool_call>"
TYPED = {"text": "None", "count": 3, "ratio": -2500.0, "flag": True, "table": {"a": [1, None]}, "rows": [1, True]}
TYPED_TEXT = {**TYPED, "ratio": "-2.5e3", "table": '{"a": [1, null]}', "rows": "[1, true]"}
MISTYPED = {"count": "3.5", "flag": "1", "table": "[1]"}
LETTERS = {"text": "日本 <ü> 🙂", "鍵": "x"}

TURNS = {
    "empty": expect("", "", ""),
    "answer": expect("r\n</think>\na<|im_end|>", "r", "a"),
    "opened": expect("<think>\nr\n</think>\na", "r", "a"),
    "newlines": expect("\n\nr\n\n\n</think>\n\n\na\n\n<|im_end|>", "\n\nr\n\n", "\n\na\n\n"),
    "no reasoning": expect("\n</think>\na", "", "a"),
    "unfinished": expect("r <thin\n<|im_end|>", "r <thin\n", ""),
    "end inside": expect("r<|im_end|>\n</think>a<|im_end|>b", "r<|im_end|>", "a<|im_end|>b"),
    "blank": expect("r</think>\n \n<|im_end|>", "r", " \n"),
    "two calls": expect(f"r\n</think>\n{CALL}{CALL}<|im_end|>", "r", "", V, V),
    "text between": expect(
        f"r\n</think>\nOn it.\n{CALL} and\n\n{CALL}\n \n{CALL}. Done.", "r", "On it.\n and\n\n. Done.", V, V, V
    ),
    "blank before": expect(f"</think>\n\n {CALL}\na\n", "", "\na\n", V),
    "before think": expect(f"r\n\n{CALL}\n</think>\ndone", "r\n", "done", V),
    "around think": expect(f"r{CALL}\n</think>\n{CALL}</think>", "r", "</think>", V, V),
    "no parameter end": expect("</think>" + CALL.replace("</parameter>\n", "") + CALL, "", "", V, V),
    "no parameter end twice": expect(f"</think>{UNCLOSED}{CALL}", "", "", {"text": "", "count": 1}, V),
    "no function end": expect("</think>" + CALL.replace("</function>\n", "") + "\n" + CALL, "", "", V, V),
    "no call end": expect("</think>" + CALL.replace("\n</tool_call>", "\n Done."), "", "Done.", V),
    "no call start": expect("</think>" + CALL.replace("<tool_call>\n", ""), "", "", V),
    "no newlines": expect("</think>" + CALL.replace("\n", ""), "", "", V),
    "more blanks": expect("</think>\n" + CALL.replace(">\n<", "> \n\n <") + "\n", "", "", V),
    "mentions": expect(f"{MENTIONS}\n</think>\n{MENTIONS}", MENTIONS, MENTIONS),
    "mentions while thinking": expect(CALL_LIKE, CALL_LIKE, ""),
    "mentions in a value": expect("</think>" + call(text=QUOTING), "", "", {"text": QUOTING}),
    "call in a value": expect("</think>" + call(text=f"a{CALL[:30]}b"), "", "", {"text": f"a{CALL[:30]}b"}),
    "no arguments": expect("</think>" + call() + call(), "", "", {}, {}),
    "empty values": expect("</think>" + call(text="", count=""), "", "", {"text": "", "count": ""}),
    "blank value": expect("</think>" + call(text="\n a \n"), "", "", {"text": "\n a \n"}),
    "unicode": expect("思考🙂\n</think>\nñ\u2028é" + call(**LETTERS), "思考🙂", "ñ\u2028é", LETTERS),
    "types": expect("</think>" + call(**TYPED_TEXT, maybe="null"), "", "", {**TYPED, "maybe": None}),
    "wrong types": expect("</think>" + call(**MISTYPED), "", "", MISTYPED),
}


def joined(events: list[Event]) -> Any:
    """Return the message that the events tell, and check their order."""
    text = {ReasoningDelta: "", ContentDelta: ""}
    calls: list[Any] = []
    started = 0
    for event in events:
        if isinstance(event, ToolCallStart):
            assert event.index == started == len(calls)
            started += 1
        elif isinstance(event, ToolCallEnd):
            assert event.index == len(calls) == started - 1
            calls.append((event.name, event.arguments))
        else:
            assert event.text
            assert started == len(calls)
            text[type(event)] += event.text
    assert started == len(calls)
    message = message_of(text[ReasoningDelta], text[ContentDelta], [arguments for _, arguments in calls])
    for one, (name, _) in zip(message.get("tool_calls", ()), calls, strict=True):
        one["function"]["name"] = name
    return message


def streamed(pieces: list[str], tools: Any = TOOLS, *, thinking: bool = True) -> Any:
    parser = TurnParser(tools, thinking=thinking)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    message = joined(events)
    assert message == parser.message
    assert repr(message) == repr(parser.message)  # equal types too: 1 == True == 1.0
    return message


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


@pytest.mark.parametrize(("text", "expected"), TURNS.values(), ids=TURNS)
def test_every_cut_of_a_turn_gives_the_same_message(text: str, expected: Any) -> None:
    assert repr(parse(text, TOOLS)) == repr(expected)
    assert streamed(list(text)) == expected
    for place in range(len(text) + 1):
        assert streamed([text[:place], text[place:]]) == expected


@pytest.mark.parametrize(("text", "expected"), TURNS.values(), ids=TURNS)
def test_a_turn_without_thinking_is_content_from_the_start(text: str, expected: Any) -> None:
    thoughtless: Any = {**expected, "reasoning_content": ""}
    answer = chat.render([thoughtless]).removeprefix("<|im_start|>assistant\n").removesuffix("\n")
    assert parse(answer, TOOLS, thinking=False) == thoughtless
    assert streamed(list(answer), thinking=False) == thoughtless
    assert TurnParser(TOOLS, thinking=False).reasoning_closed


CUT_OFF = ["text between", "before think", "no parameter end twice", "opened", "unicode", "more blanks"]


@pytest.mark.parametrize("name", CUT_OFF)
def test_output_cut_off_anywhere_parses_alike_in_pieces(name: str) -> None:
    text, _ = TURNS[name]
    for length in range(len(text)):
        expected = parse(text[:length], TOOLS)
        assert streamed(list(text[:length])) == expected
        assert parse(text[:length] + "<|im_end|>", TOOLS) == expected
        assert streamed([*text[:length], "<|im_", "end|>"]) == expected


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture["name"])
def test_golden_conversations(fixture: dict[str, Any]) -> None:
    tools = fixture.get("tools")
    pieces = chat.segments(fixture["messages"], tools)
    for index, (generated, mark) in enumerate(pieces):
        if mark:
            expected = parse(generated, tools)
            replayed = chat.segments([QUESTION, expected])
            assert replayed[1] == (generated, True), index
            assert streamed(list(generated), tools) == expected
            for place in range(len(generated)):
                assert streamed(cut(generated, [place]), tools) == expected


FRAGMENTS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "<function=", "</function>", "<"]
FRAGMENTS += ["<parameter=count>", "<parameter=text>", "<parameter=", "</parameter>", "\n", " ", "1", "a", ">"]
FRAGMENTS += ["<|im_end|>", "<tool_call>\n<function=f>\n", "<parameter=text>\nv\n</parameter>\n", CALL]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join) | st.sampled_from(
    [text for text, _ in TURNS.values()]
)
PLACES = st.lists(st.integers(0, 10_000), max_size=12)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS, places=PLACES, thinking=st.booleans())
def test_any_text_cut_anywhere_gives_the_same_message(text: str, places: list[int], thinking: bool) -> None:
    expected = parse(text, TOOLS, thinking=thinking)
    assert streamed(cut(text, places), thinking=thinking) == expected
    assert streamed(list(text), thinking=thinking) == expected


@settings(deadline=None, max_examples=200)
@given(text=TEXTS, places=PLACES, thinking=st.booleans())
def test_where_nothing_may_be_called_calls_are_text(text: str, places: list[int], thinking: bool) -> None:
    def read(pieces: list[str]) -> Any:
        parser = TurnParser(thinking=thinking, calls=False)
        for piece in pieces:
            parser.feed(piece)
        parser.finish()
        return parser.message

    message, whole = read([text]), text.removesuffix("<|im_end|>")
    assert "tool_calls" not in message
    if thinking:
        reasoning, _, content = whole.removeprefix("<think>").partition("</think>")
        assert message["reasoning_content"].strip("\n") == reasoning.strip("\n")
        assert message["content"].strip("\n") == content.strip("\n")
    else:
        assert message["content"] == whole
    assert read(cut(text, places)) == message


WORDS = st.text(st.sampled_from("ab1 \n<>/=é🙂\t_")).filter(lambda text: "</" not in text)
QUOTES = st.sampled_from(["x </parameter> y", "'</tool_call>'", "<function=f>", "\n<tool_call>", "</think>"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": WORDS | QUOTES,
        "count": st.integers() | st.none(),
        "ratio": st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "table": st.dictionaries(st.text(max_size=3), JSON, max_size=2),
        "rows": st.lists(JSON, max_size=2),
        "maybe": st.none() | st.integers(),
        "undeclared": WORDS,
    },
)


@st.composite
def turns(draw: st.DrawFn) -> Any:
    calls = draw(st.lists(ARGUMENTS, max_size=3))
    content = draw(WORDS | st.just("ok <tool_call>"))
    # Blank text before a call is not content.
    return message_of(draw(WORDS), "" if calls and not content.strip() else content, calls)


HISTORIES = st.lists(turns(), max_size=2).map(
    lambda done: [QUESTION, *[message for turn in done for message in (turn, {"role": "tool", "content": "o"})]]
)


@settings(deadline=None, max_examples=150)
@given(history=HISTORIES, turn=turns(), places=PLACES)
def test_a_parsed_turn_renders_to_what_was_generated(history: Any, turn: Any, places: list[int]) -> None:
    prompt = chat.render(history, TOOLS, add_generation_prompt=True)
    generation = chat.render([*history, turn], TOOLS).removeprefix(prompt).removesuffix("\n")
    assert generation.endswith("<|im_end|>")
    parsed = streamed(cut(generation, places))
    assert parsed == turn
    assert chat.render([*history, parsed], TOOLS) == f"{prompt}{generation}\n"


def test_text_is_told_as_soon_as_it_is_certain() -> None:
    parser = TurnParser(TOOLS)
    assert parser.feed("<thi") == []
    assert parser.feed("s") == [ReasoningDelta("<this")]
    assert parser.feed(" is\n") == [ReasoningDelta(" is")]
    assert parser.feed("\n</thin") == [ReasoningDelta("\n")]
    assert not parser.reasoning_closed
    assert parser.feed("k>") == []
    assert parser.reasoning_closed
    assert parser.feed("\n") == []
    assert parser.feed("a <b> < ") == [ContentDelta("a <b> < ")]
    assert parser.feed("b\n<tool_call>\n") == [ContentDelta("b\n")]
    assert parser.feed("<function=f") == []
    assert parser.feed(">\n<parameter=count>\n") == [ToolCallStart(0, "f")]
    assert parser.feed("1\n</parameter>\n</function>\n") == []
    assert parser.feed("</tool_call><tool_call><function=g></function>x") == [
        ToolCallEnd(0, "f", {"count": 1}),
        ToolCallStart(1, "g"),
        ToolCallEnd(1, "g", {}),
        ContentDelta("x"),
    ]
    assert parser.feed("<|im_end|>") == parser.finish() == []
    assert parser.message["content"] == "a <b> < b\nx"


def test_a_call_closes_the_reasoning_when_its_name_is_known() -> None:
    parser = TurnParser(TOOLS)
    assert parser.feed("r\n<tool_call>\n<function=f") == [ReasoningDelta("r")]
    assert not parser.reasoning_closed
    assert parser.feed(">") == [ToolCallStart(0, "f")]
    assert parser.reasoning_closed
    assert parser.finish() == [ToolCallEnd(0, "f", {})]
    cut_off = TurnParser(TOOLS)
    cut_off.feed("r\n")
    assert cut_off.finish() == [ReasoningDelta("\n")]
    assert not cut_off.reasoning_closed


class CountingParser(TurnParser):
    """Counts the characters that searches look at, and keeps the most at once."""

    searched = 0
    longest = 0

    def _cut(self, patterns: tuple[re.Pattern[str], re.Pattern[str]]) -> tuple[str, re.Match[str] | None]:
        self.searched += len(self._unread)
        self.longest = max(self.longest, len(self._unread))
        return super()._cut(patterns)


LONG = 3000


@pytest.mark.parametrize(
    ("text", "per_character"),
    [
        ("word " * LONG, 2),
        ("a\n\n" * LONG, 3),
        ("</think>" + "a < b, <b>c</b>\n" * LONG, 6),
        ("</think>" + CALL * (LONG // 10), 40),
        ("</think>\n" + call(text="if a < b: print('x = y')\n" * LONG), 6),
        ("</think>\n" + call(text="<p>'</parameter>'</p>\n" * LONG), 20),
        # Nothing that looks like a tag keeps on growing.
        ("</think><tool_call>" + "\n" * LONG, 600),
        ("</think><function=" + "a" * LONG, 600),
        ("</think><tool_call><function=f><parameter=" + "a" * LONG, 600),
        ("</think><tool_call><function=f><parameter=a>\nv</parameter>" + "\n" * LONG, 600),
        ("<" * LONG, 3),
    ],
)
def test_work_is_linear_in_the_text(text: str, per_character: int) -> None:
    parser = CountingParser(TOOLS)
    for character in text:
        parser.feed(character)
        assert len(parser._unread) < 600
    parser.finish()
    assert parser.searched <= per_character * len(text)
    assert parser.longest < 600


@pytest.mark.parametrize("length", [255, 256, 257])
def test_the_longest_tags_parse_alike_in_pieces(length: int) -> None:
    blanks, name = "\n" * length, "n" * length
    for text in (
        f"<tool_call>{blanks}<function=f>",
        f"</think><tool_call>{blanks}<function=f>",
        f"</think><function={name}>",
        f"</think><function=f><parameter={name}>1",
        f"</think>{CALL.replace('</parameter>', '</parameter>' + blanks)}",
        f"</think><function=f><parameter=text>v</parameter>{blanks}",
        f"</think><function=f><parameter=text>v\n<tool_call>{blanks}<function=f>",
    ):
        assert streamed(list(text)) == parse(text, TOOLS)
