"""A think block ends cleanly and on time, and what limits the answer begins right behind it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.api.constraint import Constraint
from step35.api.sampling import Grammar, SamplingParams
from step35.data.chat import parse
from step35.data.tokenizer import train_tokenizer
from step35.engine.grammar import GrammarCompiler
from step35.engine.thinking import ThinkingConstraint, build_constraint

TOKENIZER = train_tokenizer(["some thought\n\n"] * 3, 280)
VOCAB = TOKENIZER.vocab_size + 7
COMPILER = GrammarCompiler(TOKENIZER, VOCAB)
YES_OR_NO = Grammar(regex="yes|no")
CLOSE, CALL = TOKENIZER.id_of("</think>"), TOKENIZER.id_of("<tool_call>")
NEWLINE = TOKENIZER.encode("\n")[0]
A = TOKENIZER.encode("a")[0]


def constraint(budget: int | None = None, grammar: Grammar | None = None, in_thinking: bool = True) -> Constraint:
    params = SamplingParams(thinking_budget=budget, grammar=grammar, in_thinking=in_thinking)
    built = build_constraint(params, TOKENIZER, COMPILER)
    assert built is not None
    return built


def ids_of(constraint: Constraint) -> list[int]:
    mask = constraint.allowed()
    if mask is None:
        return list(range(TOKENIZER.vocab_size))
    assert mask.dtype == torch.bool
    assert mask.shape == (VOCAB,)
    return [int(token) for token in mask.nonzero().flatten()]


def forced(constraint: Constraint) -> list[int]:
    """Take the tokens that have no alternative."""
    taken = []
    while len(allowed := ids_of(constraint)) == 1:
        taken += allowed
        constraint.advance(allowed[0])
    return taken


@pytest.mark.parametrize("grammar", [None, YES_OR_NO])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_closes_the_block_after_exactly_that_many_tokens(budget: int, grammar: Grammar | None) -> None:
    followed = constraint(budget, grammar)
    for _ in range(budget):
        assert len(ids_of(followed)) > 1
        followed.advance(A)
    text = "a" * budget + TOKENIZER.decode(forced(followed))
    assert text == "a" * budget + "\n</think>\n"
    assert parse(text + "no")["reasoning_content"] == "a" * budget
    if grammar is None:
        assert followed.allowed() is None
    else:
        assert torch.equal(followed.allowed(), COMPILER.compile(grammar).allowed())


def test_a_newline_at_the_end_of_the_thinking_is_not_doubled() -> None:
    followed = constraint(2)
    followed.advance(A)
    followed.advance(NEWLINE)
    assert TOKENIZER.decode(forced(followed)) == "</think>\n"
    merged = TOKENIZER.encode("t\n")
    followed = constraint(len(merged))
    for token in merged:
        followed.advance(token)
    assert TOKENIZER.decode(forced(followed)) == "</think>\n"


def test_a_block_that_closes_by_itself_is_followed_by_one_newline_and_the_grammar() -> None:
    for budget in (None, 9):
        followed = constraint(budget, YES_OR_NO)
        followed.advance(A)
        followed.advance(CLOSE)
        assert forced(followed) == [NEWLINE]
        assert torch.equal(followed.allowed(), COMPILER.compile(YES_OR_NO).allowed())
    free = constraint(9)
    free.advance(CLOSE)
    for _ in range(20):
        assert free.allowed() is None
        free.advance(A)


def test_thinking_before_a_grammar_cannot_end_the_turn_or_call() -> None:
    allowed = ids_of(constraint(None, YES_OR_NO))
    assert set(range(TOKENIZER.vocab_size)) - set(allowed) == {*TOKENIZER.eos_ids, CALL}
    assert max(allowed) < TOKENIZER.vocab_size
    assert constraint(5).allowed() is None


def test_a_call_inside_free_thinking_is_not_cut_by_the_budget() -> None:
    followed = constraint(2)
    for token in (A, CALL, A, A, A):
        assert followed.allowed() is None
        followed.advance(token)
    assert followed.allowed() is None


def test_without_an_open_block_the_grammar_starts_at_once() -> None:
    followed = constraint(3, YES_OR_NO, in_thinking=False)
    assert torch.equal(followed.allowed(), COMPILER.compile(YES_OR_NO).allowed())
    assert constraint(0, in_thinking=False).allowed() is None


def test_nothing_is_built_for_nothing() -> None:
    assert build_constraint(SamplingParams(in_thinking=True), TOKENIZER, COMPILER) is None


def test_the_end_of_a_block_takes_no_other_token() -> None:
    followed = constraint(0)
    with pytest.raises(ValueError, match=f"{NEWLINE} has to"):
        followed.advance(A)
    with pytest.raises(ValueError, match="cannot take 1 tokens back; there are 0"):
        followed.rollback(1)
    bare = ThinkingConstraint(TOKENIZER, budget=0, inner=None, in_thinking=True)
    assert bare.allowed() is not None
    assert bare.allowed().shape == (TOKENIZER.vocab_size,)


@settings(max_examples=150, deadline=None)
@given(
    budget=st.none() | st.integers(0, 12),
    grammar=st.sampled_from([None, YES_OR_NO, Grammar(regex="a{0,9}"), Grammar(json_schema={"type": "integer"})]),
    seed=st.integers(0, 9999),
    length=st.integers(0, 30),
    data=st.data(),
)
def test_rollback_is_exact_across_the_border(
    budget: int | None, grammar: Grammar | None, seed: int, length: int, data: st.DataObject
) -> None:
    if budget is None and grammar is None:
        return
    followed, rng = constraint(budget, grammar), random.Random(seed)
    ids, allowed = list[int](), [ids_of(followed)]
    for _ in range(length):
        closes = CLOSE in allowed[-1] and rng.random() < 0.15
        ids.append(CLOSE if closes else rng.choice(allowed[-1]))
        followed.advance(ids[-1])
        allowed.append(ids_of(followed))
    for _ in range(3):
        back = data.draw(st.integers(0, length))
        followed.rollback(back)
        for place in range(length - back, length):
            assert ids_of(followed) == allowed[place]
            followed.advance(ids[place])
        assert ids_of(followed) == allowed[length]
