from __future__ import annotations

import json
from typing import Any

import pytest
from chat_cases import FIXTURES, TOOLS
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from step35.data import chat
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.errors import DataError

NAMES = [fixture["name"] for fixture in FIXTURES]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([fixture["expected"] for fixture in FIXTURES] + ["a\n\nb\n \n c"] * 50, 400)


def by_jinja(fixture: dict[str, Any]) -> str:
    """Render as transformers does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(chat.chat_template()).render(
        messages=fixture["messages"],
        tools=fixture.get("tools"),
        add_generation_prompt=fixture.get("add_generation_prompt", False),
        bos_token="<BOS>",
    )


def by_python(fixture: dict[str, Any]) -> str:
    return chat.render(fixture["messages"], fixture.get("tools"), fixture.get("add_generation_prompt", False), "<BOS>")


@pytest.mark.parametrize("fixture", FIXTURES, ids=NAMES)
def test_render_prints_the_released_bytes(fixture: dict[str, Any]) -> None:
    assert by_python(fixture) == fixture["expected"]


@pytest.mark.parametrize("fixture", FIXTURES, ids=NAMES)
def test_template_prints_the_released_bytes(fixture: dict[str, Any]) -> None:
    assert by_jinja(fixture) == fixture["expected"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": {"text": "a"}}, {"role": "assistant", "content": {"value": "b"}}],
        [{"role": "user", "content": [{"type": "text", "value": "a"}, "b", {"type": "image_url"}]}],
        [{"role": "system", "content": ""}, {"role": "user", "content": "q"}],
        [
            {"role": "tool", "content": "x"},
            {"role": "user", "content": "q"},
            {"role": "tool", "content": "y"},
        ],
        [
            {"role": "user", "content": "<tool_response>x</tool_response>"},
            {"role": "assistant", "content": "a"},
        ],
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a</think>b<think>c</think>\n\nd"},
        ],
        [],
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_template_and_render_agree_beyond_the_fixtures(messages: Any, tools: Any) -> None:
    fixture = {"messages": messages, "tools": tools, "add_generation_prompt": True}
    assert by_jinja(fixture) == by_python(fixture)


def test_json_text_is_accepted_as_arguments() -> None:
    def conversation(arguments: Any) -> Any:
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]

    assert chat.render(conversation('{"x": [1], "y": true}')) == chat.render(conversation({"x": [1], "y": True}))
    assert chat.render(conversation("")) == chat.render(conversation({}))
    for bad in ("{x", "[1]"):
        with pytest.raises(DataError, match="arguments"):
            chat.render(conversation(bad))


@pytest.mark.parametrize("messages", ["hi", ["hi"], [[{"role": "user", "content": "hi"}]]])
def test_messages_that_are_none_are_named(messages: Any) -> None:
    with pytest.raises(DataError, match=r"messages\[0\] is .*h.*; a message is a dictionary with 'role' and 'content'"):
        chat.render(messages)


def test_unknown_role_and_content_are_named() -> None:
    with pytest.raises(DataError, match=r"messages\[0\].*'robot'"):
        chat.render([{"role": "robot", "content": ""}])
    with pytest.raises(DataError, match="audio"):
        chat.render([{"role": "user", "content": [{"type": "audio"}]}])


def test_segments_mark_generated_turns_only() -> None:
    steps = next(f for f in FIXTURES if f["name"] == "multi_step_keeps_all_reasoning_after_last_query")
    pieces = chat.segments(steps["messages"], steps["tools"], "<BOS>")
    generated = [text for text, mark in pieces if mark]
    assert "".join(text for text, _ in pieces) == steps["expected"]
    assert [mark for _, mark in pieces] == [False, True] * 3 + [False]
    assert generated[0].startswith("r1\n</think>\n<tool_call>\n<function=python>")
    assert generated[0].endswith("</tool_call><|im_end|>")
    assert generated[2] == "r3\n</think>\ndone<|im_end|>"
    assert pieces[0][0].endswith("a0<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert pieces[-1] == ("\n", False)


def test_prompts_and_continuations_are_prefixes_of_the_training_ids(tokenizer: Tokenizer) -> None:
    call = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": {"text": "a"}}}
    messages: Any = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "reasoning_content": "\n \nr", "tool_calls": [call, call]},
        {"role": "tool", "content": "\n1"},
        {"role": "tool", "content": "2\n"},
        {"role": "assistant", "content": "\n a", "reasoning_content": ""},
    ]
    ids, mask = chat.encode(tokenizer, messages, TOOLS)
    assert len(ids) == len(mask)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == chat.render(messages, TOOLS, bos_token=tokenizer.bos_token)
    first, second = (chat.encode_prompt(tokenizer, messages[:n], TOOLS) for n in (1, 4))
    assert ids[: len(first)] == first
    assert ids[: len(second)] == second
    assert mask[len(first) - 1 : len(first) + 1] == [False, True]
    # The first turn as sampled, and what the environment appends to it.
    sampled = ids[len(first) : ids.index(tokenizer.id_of("<|im_end|>"), len(first)) + 1]
    appended = tokenizer.encode(chat.continuation(messages[2:4]))
    assert first + sampled + appended == second
    trained = [token for token, mark in zip(ids, mask, strict=True) if mark]
    assert tokenizer.decode(trained[len(sampled) :]) == "\n</think>\n\n a<|im_end|>"


def test_continuation_refuses_what_would_erase_thinking() -> None:
    with pytest.raises(DataError, match="user"):
        chat.continuation([{"role": "user", "content": "q"}])


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


def test_parse_splits_reasoning_and_content() -> None:
    def split(text: str) -> tuple[Any, Any]:
        message = chat.parse(text)
        assert message["role"] == "assistant"
        assert "tool_calls" not in message
        return message["reasoning_content"], message["content"]

    assert split("r\n</think>\na<|im_end|>") == ("r", "a")
    assert split("<think>\nr\n</think>\na") == ("r", "a")
    assert split("<think>\n\nr\n\n</think>\n\na\n") == ("\nr\n", "\na\n")
    assert split("\nr\n</think>a") == ("\nr", "a")
    assert split("\n</think>\na") == ("", "a")
    assert split("</think>\na") == ("", "a")
    assert split("still thinking<|im_end|>") == ("still thinking", "")
    assert split("") == ("", "")
    assert split("r\n</think>\na </think> b") == ("r", "a </think> b")
    assert split("write <tool_call> or <function=f> here") == ("write <tool_call> or <function=f> here", "")
    text = "say <tool_call>, </tool_call>, </function>, <function= or <parameter=x> freely"
    assert split(f"r\n</think>\n{text}") == ("r", text)


CALL = "<tool_call>\n<function=f>\n<parameter=text>\nv\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL.replace("\n</parameter>", "", 1),
        CALL.replace("</function>\n", ""),
        CALL.replace("</parameter>\n", "").replace("</function>\n", ""),
        CALL.replace("\n</tool_call>", ""),
        CALL.replace("<tool_call>\n", ""),
        CALL.replace("\n", ""),
        CALL.replace("\n", "\n\n").replace("\n\nv\n\n", "\nv\n"),
        CALL.split("</parameter>")[0],
    ],
)
def test_parse_tolerates_what_models_leave_out(call: str) -> None:
    message = chat.parse(f"r\n</think>\n{call}<|im_end|>", TOOLS)
    assert calls_of(message) == [("f", {"text": "v"})]
    assert (message["reasoning_content"], message["content"]) == ("r", "")
    if call.endswith("</tool_call>"):
        # A slip in one call leaves its neighbour whole, with and without a newline between them.
        for between in ("", "\n", "\n\n"):
            both = chat.parse(f"r\n</think>\n{call}{between}{CALL}\n", TOOLS)
            assert calls_of(both) == [("f", {"text": "v"})] * 2
            assert both["content"] == ""
            assert [one["id"] for one in both["tool_calls"]] == ["call_0", "call_1"]


def test_parse_lets_a_call_end_the_reasoning() -> None:
    message = chat.parse(f"r\n{CALL}\n</think>\n<|im_end|>", TOOLS)
    assert (message["reasoning_content"], message["content"]) == ("r", "")
    assert calls_of(message) == [("f", {"text": "v"})]
    assert chat.parse(f"r\n{CALL}\n</think>\ndone")["content"] == "done"


def test_parse_keeps_text_around_calls_and_tags_inside_values() -> None:
    message = chat.parse(f"r\n</think>\nOn it.{CALL}{CALL} Done.")
    assert message["content"] == "On it. Done."
    assert len(message["tool_calls"]) == 2
    for value in (
        "print('</parameter>')",
        "a </function> b",
        "if x </think> y",
        "'<tool_call>'",
        "see <parameter=a>",
    ):
        assert calls_of(chat.parse("r\n</think>\n" + CALL.replace("\nv\n", f"\n{value}\n"))) == [("f", {"text": value})]
    assert calls_of(chat.parse("</think><tool_call>\n<function=f>\n</function>\n</tool_call>")) == [("f", {})]
    unclosed = CALL.replace("v\n</parameter>", "<parameter=count>\n1\n</parameter>")
    assert calls_of(chat.parse("</think>" + unclosed, TOOLS)) == [("f", {"text": "", "count": 1})]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "3", "3"),
        ("text", "None", "None"),
        ("text", "\n a \n", "\n a \n"),
        ("text", "", ""),
        ("unknown", "3", "3"),
        ("count", "3", 3),
        ("count", "3.0", 3),
        ("count", "3.5", "3.5"),
        ("count", "three", "three"),
        ("count", "True", "True"),
        ("count", "9" * 5000, "9" * 5000),
        ("ratio", "3", 3),
        ("ratio", "-2.5e3", -2500.0),
        ("ratio", "1e999", "1e999"),
        ("ratio", "NaN", "NaN"),
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", "1", "1"),
        ("flag", "yes", "yes"),
        ("table", '{"a": [1, null]}', {"a": [1, None]}),
        ("table", "[1]", "[1]"),
        ("table", "{", "{"),
        ("rows", "[1, true]", [1, True]),
        ("rows", "[" * 100_000, "[" * 100_000),
        ("maybe", "null", None),
        ("maybe", "None", None),
        ("maybe", "7", 7),
    ],
)
def test_parse_types_values_by_the_schema(key: str, text: str, value: Any) -> None:
    call = f"<tool_call>\n<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    [(_, arguments)] = calls_of(chat.parse("</think>\n" + call, TOOLS))
    assert arguments == {key: value}
    assert type(arguments[key]) is type(value)


PLAIN = st.text(st.sampled_from("ab1 \n<>/=é🙂\t_")).filter(lambda text: "</" not in text)
QUOTED_TAGS = st.sampled_from(["x </parameter> y", "'</tool_call>'", "<function=f>", "\n<tool_call>", "</think>"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": PLAIN | QUOTED_TAGS,
        "count": st.integers() | st.none(),
        "ratio": st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "table": st.dictionaries(st.text(), JSON, max_size=3),
        "rows": st.lists(JSON, max_size=3),
        "maybe": st.none() | st.integers(),
        "undeclared": PLAIN,
    },
)


@settings(deadline=None, max_examples=200)
@given(reasoning=PLAIN, content=PLAIN | st.just("ok <tool_call>"), calls=st.lists(ARGUMENTS, max_size=3))
def test_parse_gives_a_rendered_turn_back(reasoning: str, content: str, calls: list[dict[str, Any]]) -> None:
    if calls and not content.strip():
        content = ""  # blank text before a call is not content
    turn: Any = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    if calls:
        turn["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": {"name": "f", "arguments": arguments}}
            for n, arguments in enumerate(calls)
        ]
    [generated] = [text for text, mark in chat.segments([{"role": "user", "content": "q"}, turn]) if mark]
    parsed = chat.parse(generated, TOOLS)
    assert parsed == turn
    assert chat.render([parsed]) == chat.render([turn])  # equal types too: 1 == True == 1.0


FRAGMENTS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=f>",
    "<function=",
    "</function>",
]
FRAGMENTS += ["<parameter=count>", "<parameter=text>", "</parameter>", "\n", " ", "1", "{", "a", "<|im_end|>"]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=25))
def test_parse_never_fails(parts: list[str]) -> None:
    message = chat.parse("".join(parts), TOOLS)
    chat.render([{"role": "user", "content": "q"}, message])
