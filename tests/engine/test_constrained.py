"""Grammars and thinking budgets inside the engine: the same answer with and without drafts, and always a valid one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from step35.api.messages import ToolSchema
from step35.api.sampling import Grammar, SamplingParams
from step35.data import chat
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.engine.llm import LLM
from step35.model.step35 import Step35

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
TOOL: ToolSchema = {"type": "function", "function": {"name": "jump", "description": "", "parameters": SCHEMA}}
SEEDS = range(6)


@pytest.fixture(scope="module")
def llm(build_model: Callable[..., Step35]) -> LLM:
    tokenizer: Tokenizer = train_tokenizer(['the quick brown fox {"name": "dog", "legs": 4}'] * 5, 320)
    return LLM(model=build_model(seed=3, vocab=tokenizer.vocab_size + 5), tokenizer=tokenizer)


def answers(llm: LLM, **settings: Any) -> list[str]:
    """Return what `generations` gives as text."""
    return [llm.tokenizer.turn_text(ids) for ids in generations(llm, **settings)]


def generations(llm: LLM, **settings: Any) -> list[tuple[int, ...]]:
    """Return the tokens of several seeds in one batch, the same with any number of drafts."""
    found = []
    for depth in (0, 1, 3):
        params = [SamplingParams(max_tokens=400, seed=seed, speculate=depth, **settings) for seed in SEEDS]
        completions = llm.generate([[5, 6, 7]] * len(SEEDS), params)
        assert {c.finish_reason for c in completions} == {"stop"}
        found.append([c.token_ids for c in completions])
    assert found[1] == found[2] == found[0]
    return found[0]


def test_json_fits_its_schema(llm: LLM) -> None:
    for text in answers(llm, grammar=Grammar(json_schema=SCHEMA)):
        value = json.loads(text)
        assert value["name"] in ("fox", "dog")
        assert 0 <= value["legs"] <= 99
        assert len(value) == 2


def test_a_regular_expression_matches_as_a_whole(llm: LLM) -> None:
    assert all(
        text.count("-") == 1 and len(text) == 7 for text in answers(llm, grammar=Grammar(regex="[0-9]{3}-[a-z]{3}"))
    )


def test_calls_have_typed_arguments(llm: LLM) -> None:
    for text in answers(llm, grammar=Grammar(tools=(TOOL,))):
        calls = chat.parse("</think>\n" + text, [TOOL])["tool_calls"]
        for call in calls:
            name, arguments = chat.read_call(call)
            assert name == "jump"
            assert arguments["name"] in ("fox", "dog")
            assert isinstance(arguments["legs"], int)


@pytest.mark.parametrize("budget", [0, 1, 9])
def test_thinking_ends_at_its_budget_and_the_answer_fits(llm: LLM, budget: int) -> None:
    grammar = Grammar(json_schema=SCHEMA)
    end = llm.tokenizer.id_of("</think>")
    for ids in generations(llm, grammar=grammar, thinking_budget=budget, in_thinking=True):
        assert ids.index(end) <= budget + 1  # and the newline that closes the block
        answer = llm.tokenizer.turn_text(ids).split("</think>\n")[1]
        assert set(json.loads(answer)) == {"name", "legs"}
