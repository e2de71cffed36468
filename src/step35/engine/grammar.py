"""Grammars: which tokens keep an answer inside a JSON schema, an expression, or the chat format's tool calls.

The engine asks `GrammarCompiler` for a `Constraint` and masks the logits with what it allows; llguidance parses.
The tokens of `tokenizer.SPECIAL_TOKENS` only come where a grammar names them, so no text can hold a turn's end.

Patterns are searched for, as JSON Schema has it, and may hold anchors at their ends alone, and no look-arounds.
Not enforced: of a tool's own parameter, limits of strings where it may also be an object or array, bounds of numbers
where it may also be a string, lengths past 1000 and formats other than `_FORMATS`; and closing tags quoted inside a
JSON string of a tool call, which may end it early for a parser.
"""

# V vocabulary of the model, which may be padded beyond the tokenizer's

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from step35.api.messages import ToolSchema
from step35.api.sampling import Grammar
from step35.data.chat_values import value_text
from step35.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from step35.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_CACHED = 64
"""Compiled grammars to keep; an agent sends the same tools with every turn."""

# The library's own default allows whitespace without end, and a model that is undecided writes it without end.
_JSON_DEFAULTS = {"whitespace_pattern": r"\n?[ \t]{0,32}"}
# What `json.dumps` prints, as in the chat format.
_JSON_IN_CALL = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# A text is a string with the newlines and the tag around it. It must not hold what `chat_parse` takes for its end.
# Digits are bounded so that Python reads every number back: it refuses very long integers, and 1e999 is no JSON.
_TERMINALS = r"""
ANY: /(?s:.*)/
ENDING: "</parameter>" | /<\/function>\s*<\/tool_call>/ | /\n<parameter=[^>\n]+>\n/
  | /\n<\/function>\n/ | /\n<\/tool_call>/ | /\n<tool_call>\s*<function=/
INTEGER: /-?(0|[1-9][0-9]{0,17})/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/
"""
_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "email": r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+",
}
_LONGEST = 1000
"""Lengths that are counted; the library gives up at some thousands."""
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


class GrammarCompiler:
    """Makes constraints for one tokenizer and model; the library and its tables load on the first use."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._matchers: dict[str, LLMatcher] = {}

    def compile(self, grammar: Grammar) -> GrammarConstraint:
        """Return a fresh constraint; raise `ConfigError` when the grammar is unusable or llguidance is missing."""
        backend = self._backend
        source = self._source(grammar)
        matcher = self._matchers.get(source)
        if matcher is None:
            from llguidance import LLMatcher

            matcher = LLMatcher(backend, source, log_level=0)
            if matcher.is_error():
                raise ConfigError(f"the grammar cannot be compiled: {matcher.get_error()}")
            if len(self._matchers) >= _CACHED:
                self._matchers.pop(next(iter(self._matchers)))
            self._matchers[source] = matcher
        return GrammarConstraint(matcher.deep_copy(), self.tokenizer.eos_ids, self.vocab_size)

    @cached_property
    def _backend(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise ConfigError("grammars need llguidance, which is not installed: pip install 'step35[serve]'") from None
        content = json.loads(self.tokenizer.backend.to_str())
        for token in content["added_tokens"]:
            # Else the library would let the thinking and tool tokens stand for their letters in any string.
            token["special"] |= token["content"] in SPECIAL_TOKENS
        size = max(self.vocab_size, self.tokenizer.vocab_size)
        try:
            return LLTokenizer(json.dumps(content), n_vocab=size, eos_token=list(self.tokenizer.eos_ids))
        except Exception as error:  # whatever the binding makes of a Rust error
            raise ConfigError(f"llguidance cannot use this tokenizer for grammars: {error}") from None

    def _source(self, grammar: Grammar) -> str:
        """Return the grammar in the library's own form."""
        from llguidance import LLMatcher, regex_to_lark

        try:
            if grammar.json_schema is not None:
                text = json.dumps(dict(grammar.json_schema))
                return LLMatcher.grammar_from_json_schema(text, defaults=_JSON_DEFAULTS)  # type: ignore[arg-type]
            if grammar.regex is not None:
                # Its own \d takes the digits of every script, which few callers mean.
                expression = regex_to_lark(grammar.regex, use_ascii="d")
                return LLMatcher.grammar_from_lark(f"start: /{expression or '(?:)'}/")
            return LLMatcher.grammar_from_lark(tools_lark(grammar.tools, self.tokenizer))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the grammar cannot be compiled: {error}") from None


class GrammarConstraint:
    """Follows one answer through its grammar. Once that is complete, and ended, only end tokens may come."""

    def __init__(self, matcher: LLMatcher, eos_ids: Iterable[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._ends = frozenset(eos_ids)
        self._vocab_size = vocab_size
        self._consumed = 0
        self._ended = 0
        """End tokens taken; the matcher never sees them, as it does not count those behind its own stop."""

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next (V,), on the CPU."""
        allowed_V = torch.zeros(self._vocab_size, dtype=torch.bool)
        if self._ended:
            allowed_V[sorted(self._ends)] = True
            return allowed_V
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        if self._matcher.is_error():
            raise ConfigError(f"the grammar cannot be followed further: {self._matcher.get_error()}")
        size = min(len(mask), self._vocab_size)
        allowed_V[:size] = mask[:size]
        return allowed_V

    def advance(self, token: int) -> None:
        """Move on by one token; raise `ValueError`, and stay, when the grammar does not allow it."""
        if token in self._ends and (self._ended or self._matcher.is_accepting()):
            self._ended += 1
        elif not self._ended and token not in self._ends and self._matcher.try_consume_tokens([token]) == 1:
            self._consumed += 1
        else:
            raise ValueError(f"token {token} does not follow the grammar; take one that `allowed` permits.")

    def rollback(self, tokens: int) -> None:
        """Take the last `tokens` tokens back."""
        if not 0 <= tokens <= self._ended + self._consumed:
            raise ValueError(f"cannot take {tokens} tokens back; there are {self._ended + self._consumed}.")
        ended = min(tokens, self._ended)
        self._ended -= ended
        consumed = tokens - ended
        if consumed and not self._matcher.rollback(consumed):
            raise RuntimeError(f"llguidance cannot take {consumed} tokens back: {self._matcher.get_error()}")
        self._consumed -= consumed


def tools_lark(tools: Iterable[ToolSchema], tokenizer: Tokenizer) -> str:
    """Return the Lark grammar of one or more calls, as `chat` prints them; raise `ConfigError` on a bad schema."""
    opening, closing = tokenizer.id_of("<tool_call>"), tokenizer.id_of("</tool_call>")
    texts: dict[str, str] = {}
    functions = " | ".join(_function(tool, texts) for tool in tools)
    named = "".join(
        f'{name}: (("\\n" ({value}) "\\n") & ~(ANY ENDING ANY)) "</parameter>\\n"\n' for value, name in texts.items()
    )
    return f"start: call+\ncall: <[{opening}]> ({functions}) <[{closing}]>\n{_TERMINALS}{named}"


def _function(tool: ToolSchema, texts: dict[str, str]) -> str:
    """Return the expression of a call, between its two tool tokens; `texts` gives terminals for values their names."""
    function = tool.get("function") or tool
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.:/-]*", name):
        raise ConfigError(f"tool name {name!r} cannot be called; use letters, digits and any of _ - . : /")
    schema = function.get("parameters") or {}
    required = schema.get("required") or ()
    properties = schema.get("properties") or {}
    if missing := [key for key in required if key not in properties]:
        raise ConfigError(f"tool '{name}' requires {missing}, which its properties {list(properties)} lack; add them.")
    parameters = (
        _parameter(key, value, schema, texts) + "?" * (key not in required) for key, value in properties.items()
    )
    return " ".join([_literal(f"\n<function={name}>\n"), *parameters, _literal("</function>\n")])


def _parameter(key: str, schema: Any, root: Mapping[str, Any], texts: dict[str, str]) -> str:
    if not re.fullmatch(r"[^>\n]+", key):
        raise ConfigError(f"parameter name {key!r} cannot be written in a call; leave out '>' and newlines.")
    opening, newline, closing = f"<parameter={key}>", "\n", "</parameter>\n"
    forms = _forms(schema, root)
    if forms is None:
        name = texts.setdefault(_text(schema, root), f"TEXT_{len(texts)}")
        return f"({_literal(opening)} {name})"
    value = " | ".join(dict.fromkeys(forms))
    return f"({_literal(opening + newline)} ({value}) {_literal(newline + closing)})"


def _text(schema: Any, root: Mapping[str, Any]) -> str:
    """Return the expression of a value that may be text: one of letters alone, for a terminal."""
    schema = _resolve(schema, root)
    if alternatives := _alternatives(schema):
        texts = dict.fromkeys(_text(alternative, root) for alternative in alternatives)
        return "ANY" if "ANY" in texts else " | ".join(f"({text})" for text in texts)
    forms = _forms(schema, root)
    if forms is not None:
        if not any(form.startswith("%json") for form in forms):
            return " | ".join(forms)
        return {"integer": "INTEGER", "number": "NUMBER"}.get(schema["type"], "ANY")
    limits = ["ANY"]
    if schema.get("type") == "string":
        if "pattern" in schema:
            limits.append(_search(schema["pattern"]))
        if (form := _FORMATS.get(schema.get("format", ""))) is not None:
            limits.append(f"/{form}/")
        least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if least or most <= _LONGEST:
            limits.append(f"/(?s:.){{{min(least, _LONGEST)},{most if most <= _LONGEST else ''}}}/")
    return " & ".join(limits)


def _search(pattern: str) -> str:
    """Return the expression of the texts in which the pattern is found."""
    from llguidance import regex_to_lark

    found = regex_to_lark(pattern, use_ascii="d")
    from_start, to_end = found.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", found) is not None
    inner = found[from_start : len(found) - to_end]
    return f"/{'' if from_start else '(?s:.*)'}({inner}){'' if to_end else '(?s:.*)'}/"


def _forms(schema: Any, root: Mapping[str, Any]) -> list[str] | None:
    """Return the alternatives of a value, as expressions; None when it may be any text."""
    schema = _resolve(schema, root)
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return [_literal(value_text(value)) for value in values]
    alternatives = _alternatives(schema)
    if not alternatives:
        return _typed(schema.get("type"), schema, root)
    forms: list[str] = []
    for alternative in alternatives:
        some = _forms(alternative, root)
        if some is None:
            return None
        forms += some
    return forms


def _alternatives(schema: Mapping[str, Any]) -> list[Any]:
    """Return the schemas of which a value may match any; none where it is described by this one."""
    declared = schema.get("type")
    several = [{**schema, "type": kind} for kind in declared] if isinstance(declared, list) else []
    return [*schema.get("anyOf", ()), *schema.get("oneOf", ())] or several


def _typed(kind: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[str] | None:
    """Return the alternatives of a value of one declared type; None for strings and what is not declared."""
    if kind == "boolean":
        return ['"True"', '"False"']
    if kind == "null":
        return ['"None"']
    if kind in ("integer", "number"):
        bounds = {key: schema[key] for key in _BOUNDS if key in schema}
        return [_json({"type": kind} | bounds) if bounds else kind.upper()]
    if kind in ("object", "array"):
        shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return [_json({**shared, **schema, "type": kind})]
    return None


def _resolve(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow references to the definitions of the tool's parameters; what is no schema allows everything."""
    for _ in range(16):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str):
            break
        place: Any = root
        for part in reference.removeprefix("#/").split("/"):
            place = place.get(part) if isinstance(place, Mapping) else None
        if place is None:
            raise ConfigError(f"reference '{reference}' leads nowhere; define it in the tool's parameters.")
        schema = place
    return schema if isinstance(schema, Mapping) else {}


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_IN_CALL}, ensure_ascii=False)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
