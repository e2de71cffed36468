"""Whatever is sampled under a grammar fits it, and drafts that are taken back leave no trace."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.api.constraint import Constraint
from step35.api.sampling import Grammar
from step35.data.chat import parse
from step35.data.tokenizer import train_tokenizer
from step35.engine.grammar import GrammarCompiler
from step35.errors import ConfigError

# Few tokens, so that random walks end, and merges that run across the borders of JSON and of tags.
TOKENIZER = train_tokenizer(['{"a": 1, "b": [true]}\n</parameter>\n</function>\n<parameter=city>\n'] * 3, 310)
VOCAB = TOKENIZER.vocab_size + 13
COMPILER = GrammarCompiler(TOKENIZER, VOCAB)


def tool(name: str, properties: dict[str, Any], required: list[str], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required} | more
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = (
    tool(
        "weather.at",
        {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 2, "maximum": 14},
            "unit": {"type": "string", "enum": ["°C", "°F", 'a "b"']},
            "exact": {"type": "boolean"},
        },
        ["city", "days", "exact"],
    ),
    tool(
        "store",
        {
            "key": {"type": "integer"},
            "weight": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
            "record": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
            "note": {"description": "no declared type"},
        },
        ["weight", "record"],
        **{"$defs": {"tag": {"enum": ["x", "y"]}}},
    ),
    tool("stop", {}, []),
)
TYPES: dict[str, Callable[[Any], bool]] = {
    "city": lambda value: isinstance(value, str),
    "days": lambda value: type(value) is int and 2 <= value <= 14,
    "unit": lambda value: value in ("°C", "°F", 'a "b"'),
    "exact": lambda value: isinstance(value, bool),
    "key": lambda value: type(value) is int,
    "weight": lambda value: value is None or type(value) in (int, float),
    "tags": lambda value: isinstance(value, list) and set(value) <= {"x", "y"} and len(value) <= 3,
    "record": lambda value: isinstance(value, dict) and isinstance(value["ok"], bool),
    "note": lambda value: isinstance(value, str),
}

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad", None]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    (
        PERSON,
        lambda value: (
            {"name", "age"} <= set(value) <= {"name", "age", "mood"}
            and len(value["name"]) <= 9
            and 0 <= value["age"] <= 150
            and value.get("mood") in ("good", "bad", None)
        ),
    ),
    (
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
        lambda value: 2 <= len(value) <= 4 and all(type(item) in (int, float) for item in value),
    ),
    ({"type": "boolean"}, lambda value: isinstance(value, bool)),
    (
        {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"é": {"type": "null"}}, "required": ["é"]}]},
        lambda value: isinstance(value, str) or value["é"] is None,
    ),
]
GRAMMARS = [
    *(Grammar(json_schema=schema) for schema, _ in SCHEMAS),
    Grammar(regex="(yes|no|né)+, [a-c]{2,4}"),
    Grammar(tools=TOOLS),
]
CLOSER = "\n</parameter>\n"


def ids_of(constraint: Constraint) -> list[int]:
    mask = constraint.allowed()
    assert mask is not None
    assert mask.dtype == torch.bool
    assert mask.shape == (VOCAB,)
    assert not mask[TOKENIZER.vocab_size :].any()
    return [int(token) for token in mask.nonzero().flatten()]


def choose(allowed: list[int], ids: list[int], rng: random.Random, hurry: bool, tools: bool) -> int:
    """Draw a token; in a hurry, one that leads to the end."""
    if hurry:
        text = TOKENIZER.decode(ids)
        length = max(n for n in range(len(CLOSER)) if text.endswith(CLOSER[:n]))
        wanted = [*TOKENIZER.eos_ids, *TOKENIZER.encode(CLOSER[length] * tools + '"}]')]
        for token in wanted:
            if token in allowed:
                return token
    return rng.choice(allowed)


def walk(grammar: Grammar, seed: int, free: int = 40) -> str:
    """Sample to the end; return the text without the end token."""
    constraint, rng, ids = COMPILER.compile(grammar), random.Random(seed), list[int]()
    while not ids or ids[-1] not in TOKENIZER.eos_ids:
        assert len(ids) < 2000
        ids.append(choose(ids_of(constraint), ids, rng, len(ids) > free, bool(grammar.tools)))
        constraint.advance(ids[-1])
    assert sorted(ids_of(constraint)) == sorted(TOKENIZER.eos_ids)
    return TOKENIZER.decode(ids[:-1])


def feed(grammar: Grammar, text: str) -> Constraint:
    constraint = COMPILER.compile(grammar)
    for token in TOKENIZER.encode(text):
        constraint.advance(token)
    return constraint


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether `text` is a whole answer."""
    try:
        return TOKENIZER.eos_ids[0] in ids_of(feed(grammar, text))
    except ValueError:
        return False


@pytest.mark.parametrize("index", range(len(SCHEMAS)))
def test_sampled_json_fits_its_schema(index: int) -> None:
    schema, fits = SCHEMAS[index]
    for seed in range(12):
        text = walk(Grammar(json_schema=schema), seed)
        assert fits(json.loads(text)), text


@pytest.mark.parametrize("regex", ["(yes|no|né)+, [a-c]{2,4}", r"\d{4}-\d\d-\d\d", "a*", "[^\n<]{3,30}"])
def test_sampled_text_matches_its_expression(regex: str) -> None:
    for seed in range(10):
        text = walk(Grammar(regex=regex), seed)
        assert re.fullmatch(regex, text), text


def test_sampled_calls_have_their_declared_types() -> None:
    seen = set()
    for seed in range(40):
        text = walk(Grammar(tools=TOOLS), seed, free=30 + 5 * seed)
        message = parse("</think>\n" + text, TOOLS)
        calls = message["tool_calls"]
        assert message["content"] == ""
        assert len(calls) == TOKENIZER.encode(text).count(TOKENIZER.id_of("<tool_call>"))
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            schema = next(tool["function"] for tool in TOOLS if tool["function"]["name"] == name)["parameters"]
            assert isinstance(arguments, dict)
            assert [key for key in schema["properties"] if key in arguments] == list(arguments)
            assert set(schema["required"]) <= set(arguments)
            assert all(TYPES[key](value) for key, value in arguments.items()), text
            seen |= {name, *arguments}
    assert seen == {"weather.at", "store", "stop", *TYPES}


CALL = "<tool_call>\n<function=store>\n<parameter=weight>\n{}\n</parameter>\n<parameter=record>\n{}\n</parameter>\n"
END = "</function>\n</tool_call>"


def test_digits_in_expressions_are_ascii_and_slashes_and_newlines_are_plain() -> None:
    assert accepts(Grammar(regex=r"\d+"), "12")
    assert not accepts(Grammar(regex=r"\d+"), "٣")
    assert accepts(Grammar(regex="a/b\n\\/c|d"), "a/b\n/c")
    assert accepts(Grammar(regex="a/b\n\\/c|d"), "d")
    assert accepts(Grammar(regex=""), "")


def test_which_calls_are_accepted() -> None:
    grammar = Grammar(tools=TOOLS)
    stop = "<tool_call>\n<function=stop>\n" + END
    assert accepts(grammar, stop)
    assert accepts(grammar, stop + stop)
    assert accepts(grammar, CALL.format("-1.5e3", '{"ok": true, "more": [1, null]}') + END)
    assert accepts(grammar, CALL.format("None", '{"ok": false}') + END)
    assert not accepts(grammar, CALL.format("null", '{"ok": false}') + END)
    assert not accepts(grammar, CALL.format("1", '{"ok": True}') + END)
    assert not accepts(grammar, CALL.format("1", "{}") + END)
    assert not accepts(grammar, "<tool_call>\n<function=store>\n" + END)
    assert not accepts(grammar, "<tool_call>\n<function=other>\n" + END)
    assert not accepts(grammar, "text " + stop)
    assert not accepts(grammar, "")


@pytest.mark.parametrize("value", ["", "two\nlines\n", "<b>", "a < b </param", "None", "\n", "<function=f>", "é🙂"])
def test_texts_come_back_as_they_were(value: str) -> None:
    text = CALL.format(1, '{"ok": true}') + f"<parameter=note>\n{value}\n</parameter>\n" + END
    assert accepts(Grammar(tools=TOOLS), text)
    assert parse("</think>\n" + text, TOOLS)["tool_calls"][0]["function"]["arguments"]["note"] == value  # type: ignore[index]


@pytest.mark.parametrize("value", ["a</parameter>b", "\n<parameter=x>\n", "</function>", "a</function> </tool_call>"])
def test_texts_that_a_parser_would_cut_are_refused(value: str) -> None:
    text = CALL.format(1, '{"ok": true}') + f"<parameter=note>\n{value}\n</parameter>\n" + END
    assert not accepts(Grammar(tools=TOOLS), text)


def call_with(value: str) -> str:
    return f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>\n</tool_call>"


def limited(**schema: Any) -> Grammar:
    schema = {key: value for key, value in ({"type": "string"} | schema).items() if value is not None}
    return Grammar(tools=(tool("f", {"a": schema}, ["a"]),))


LIMITS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"pattern": "[0-9]{2}"}, ["12", "a\n123 b"], ["1a2", ""]),
    ({"pattern": r"^\d{4}-\d\d$"}, ["2026-07"], ["2026-7", "a2026-07", "2026-07\n", "٣٣٣٣-٣٣"]),
    ({"pattern": "^/[a-z/]+"}, ["/usr/lib", "/a b"], ["usr", "/"]),
    ({"pattern": r"\$$"}, ["a$", "$"], ["$a", "a"]),
    ({"pattern": r"x\$"}, ["x$", "ax$b"], ["x"]),
    ({"pattern": r"x\\$"}, ["x\\", "ax\\"], ["x\\b"]),
    ({"pattern": "^(cat|dog)$", "maxLength": 3}, ["cat"], ["cats", "cat dog"]),
    ({"minLength": 2, "maxLength": 3}, ["é🙂", "\n\n", "abc"], ["a", "abcd", ""]),
    ({"minLength": 1}, ["a", "a" * 1500], [""]),
    ({"maxLength": 4000}, ["", "a" * 1500], []),
    ({"pattern": "^a|^b"}, ["a", "bc"], ["cb", ""]),
    ({"pattern": "^<"}, ["<b>"], ["b", "<a</parameter>"]),
    ({"format": "date"}, ["2026-02-28"], ["2026-13-01", "today"]),
    ({"format": "date-time"}, ["2026-02-28T23:59:00.5+01:00"], ["2026-02-28 23:59:00"]),
    ({"format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ({"format": "email", "pattern": "org$"}, ["a.b@c.org"], ["a@c.com", "a@", "c.org"]),
    ({"format": "other"}, ["anything"], []),
    ({"enum": ["a\nb", "c"]}, ["a\nb", "c"], ["a", "d"]),
    ({"const": "only"}, ["only"], ["", "only "]),
    ({"type": ["string", "null"], "pattern": "^[a-z]+$", "maxLength": 4}, ["abc", "None"], ["abcde", "Nine", ""]),
    ({"type": ["string"], "maxLength": 2}, ["ab"], ["abc"]),
    (
        {"type": None, "anyOf": [{"type": "string", "format": "date"}, {"type": "integer", "minimum": 3}]},
        ["2026-02-28", "-12"],
        ["today", "1.5", "2026-02-28x"],
    ),
    (
        {"type": None, "oneOf": [{"enum": ["a b", 5, True]}, {"type": "string", "minLength": 9}]},
        ["a b", "5", "True", "a" * 9],
        ["a", "6", "a" * 8],
    ),
    (
        {
            "type": None,
            "anyOf": [{"type": "string", "maxLength": 2}, {"anyOf": [{"type": "null"}, {"type": "number"}]}],
        },
        ["ab", "None", "1.25"],
        ["abc", "Nona"],
    ),
    # An object has no expression of letters alone, so the string beside it is free.
    ({"type": None, "anyOf": [{"type": "string", "maxLength": 2}, {"type": "object"}]}, ["ab", '{"a": 1}', "abc"], []),
    ({"type": None, "anyOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}, ["abc"], []),
]


@pytest.mark.parametrize(("schema", "fitting", "others"), LIMITS)
def test_a_tools_own_strings_keep_their_limits(schema: dict[str, Any], fitting: list[str], others: list[str]) -> None:
    grammar = limited(**schema)
    assert [accepts(grammar, call_with(value)) for value in fitting] == [True] * len(fitting)
    assert [accepts(grammar, call_with(value)) for value in others] == [False] * len(others)


@pytest.mark.parametrize(
    "schema", [{"pattern": "^[0-9]-[x-z]"}, {"pattern": "^a+b$"}, {"minLength": 3, "maxLength": 5}]
)
def test_sampled_strings_keep_their_limits(schema: dict[str, Any]) -> None:
    grammar = limited(**schema)
    for seed in range(8):
        text = walk(grammar, seed)
        for call in parse("</think>\n" + text, grammar.tools)["tool_calls"]:
            value = call["function"]["arguments"]["a"]  # type: ignore[index]
            assert re.search(schema.get("pattern", ""), value), value
            assert schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 999), value


def test_many_limited_strings_fit_into_one_grammar() -> None:
    limits = {"type": "string", "maxLength": 1000}
    properties = {f"p{n}": limits | {"pattern": f"^[a-{'cdefghij'[n]} ]*$"} for n in range(8)}
    values = "".join(f"<parameter=p{n}>\nab c\n</parameter>\n" for n in range(8))
    grammar = Grammar(tools=(tool("f", properties, list(properties)),))
    assert accepts(grammar, f"<tool_call>\n<function=f>\n{values}</function>\n</tool_call>")


PIECES = st.sampled_from(
    ["\n", " ", "a", "</parameter>", "<parameter=key>", "</function>", "</tool_call>", "<tool_call>", "<function=stop>"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=6).map("".join), st.sampled_from(["", "<parameter=exact>\nTrue\n</parameter>\n"]))
def test_a_parser_reads_every_text_that_is_accepted(value: str, more: str) -> None:
    tools = (tool("f", {"city": {"type": "string"}, "exact": {"type": "boolean"}}, ["city"]),)
    constraint, text = COMPILER.compile(Grammar(tools=tools)), f"\n{value}\n</parameter>\n{more}</function>\n"
    opening = TOKENIZER.encode("<tool_call>\n<function=f>\n<parameter=city>")
    # The tool tokens of the value are spelled letter by letter, which is the only way to have them in a text.
    spelled = [token for character in text for token in TOKENIZER.encode(character)]
    ids = [*opening, *spelled, TOKENIZER.id_of("</tool_call>")]
    try:
        for token in ids:
            constraint.advance(token)
    except ValueError:
        assert "<" in value
        return
    expected = {"city": value} | ({"exact": True} if more else {})
    calls = parse("</think>\n" + TOKENIZER.decode(ids), tools)["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == [expected]


def test_no_string_can_hold_a_special_token() -> None:
    opened = ids_of(feed(Grammar(json_schema={"type": "string"}), '"a'))
    in_call = ids_of(feed(Grammar(tools=TOOLS), "<tool_call>\n<function=weather.at>\n<parameter=city>\na"))
    added = set(TOKENIZER.backend.get_added_tokens_decoder())
    assert not added & set(opened)
    assert not added & set(in_call)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(GRAMMARS) - 1), st.integers(0, 999), st.integers(0, 120), st.data())
def test_rollback_is_exact(index: int, seed: int, length: int, data: st.DataObject) -> None:
    constraint, rng = COMPILER.compile(GRAMMARS[index]), random.Random(seed)
    ids, masks = list[int](), [constraint.allowed()]
    for _ in range(length):
        tools = bool(GRAMMARS[index].tools)
        ids.append(choose(ids_of(constraint), ids, rng, rng.random() < 0.3, tools))
        constraint.advance(ids[-1])
        masks.append(constraint.allowed())
    for _ in range(2):
        back = data.draw(st.integers(0, length))
        constraint.rollback(back)
        for place in range(length - back, length):
            assert torch.equal(constraint.allowed(), masks[place])
            constraint.advance(ids[place])
        assert torch.equal(constraint.allowed(), masks[length])


def test_constraints_of_one_grammar_do_not_share_their_place() -> None:
    first = COMPILER.compile(Grammar(regex="abc"))
    second = COMPILER.compile(Grammar(regex="abc"))
    first.advance(TOKENIZER.encode("a")[0])
    assert ids_of(first) == TOKENIZER.encode("b")
    assert TOKENIZER.encode("a")[0] in ids_of(second)


def test_a_refused_token_leaves_the_place_as_it_was() -> None:
    constraint = COMPILER.compile(Grammar(regex="ab"))
    for token in (TOKENIZER.encode("b")[0], TOKENIZER.eos_ids[0]):
        with pytest.raises(ValueError, match="does not follow the grammar"):
            constraint.advance(token)
    constraint.advance(TOKENIZER.encode("a")[0])
    assert ids_of(constraint) == TOKENIZER.encode("b")
    with pytest.raises(ValueError, match="cannot take 2 tokens back; there are 1"):
        constraint.rollback(2)


def test_a_model_vocabulary_may_be_smaller_than_the_tokenizers() -> None:
    mask = GrammarCompiler(TOKENIZER, 270).compile(Grammar(regex="a+")).allowed()
    assert mask.shape == (270,)
    assert mask.any()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(regex="a("), "unclosed group"),
        (Grammar(json_schema={"type": "thing"}), "Invalid type: thing"),
        (Grammar(json_schema={"type": {1, 2}}), "not JSON serializable"),
        (Grammar(tools=(tool("a b", {}, []),)), "tool name 'a b'"),
        (Grammar(tools=(tool("f", {"a>": {}}, []),)), "parameter name 'a>'"),
        (limited(pattern="a("), "unclosed group"),
        (limited(pattern="a(?=b)"), "look-ahead"),
        (limited(pattern="a|^b"), "lookarounds not supported"),
        (limited(pattern=5), "cannot be compiled"),
        (limited(minLength=5, maxLength=3), "invalid repetition"),
        (Grammar(tools=(tool("f", {}, ["a"]),)), r"requires \['a'\]"),
        (Grammar(tools=(tool("f", {"a": {"$ref": "#/$defs/b"}}, []),)), "leads nowhere"),
        (Grammar(tools=(tool("f", {"a": {"type": "array", "items": {"type": "thing"}}}, []),)), "Invalid type: thing"),
    ],
)
def test_unusable_grammars_say_why(grammar: Grammar, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        COMPILER.compile(grammar)


def test_a_missing_library_names_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'step35\[serve\]'"):
        GrammarCompiler(TOKENIZER, VOCAB).compile(Grammar(regex="a"))
