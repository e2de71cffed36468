from __future__ import annotations

import re

import pytest

from step35.data.arithmetic import Split, document, held_out, problem

SPLITS: tuple[Split, Split] = ("train", "held_out")


def operands(text: str) -> set[int]:
    return {int(digits) for digits in re.findall(r"\d+", text)}


def test_the_split_of_the_integers_is_fixed() -> None:
    # Checkpoints outlive versions: moving the split would leak evaluation operands into training.
    assert [n for n in range(60) if held_out(n)] == [17, 18, 19, 25, 29, 30, 39, 46, 49, 57, 59]
    assert 0.11 < sum(map(held_out, range(10_000))) / 10_000 < 0.14


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_operands_stay_on_their_side(split: Split) -> None:
    symbols, nested, questions = set(), 0, set()
    for index in range(1000):
        p = problem(index, split=split, seed=3)
        assert p.answer == str(eval(p.expression))
        assert {held_out(n) for n in operands(p.expression)} == {split == "held_out"}
        assert operands(p.question) == operands(p.expression)
        symbols |= set(re.findall(r"[-+*%]|//", p.expression))
        nested += "(" in p.expression
        questions.add(re.sub(r"\d+", "N", p.question))
    assert symbols == {"+", "-", "*", "//", "%"}
    assert 20 < nested < 90
    assert len(questions) > 20


def test_question_says_which_operation_is_meant() -> None:
    words = {
        "+": r"\+|plus|Add|more",
        "-": r"-|minus|away|spends",
        "*": r"\*|times|Multiply|each",
        "//": r"//|whole|fit",
        "%": "%|modulo|remainder",
    }
    for index in range(500):
        p = problem(index, split="train", seed=0)
        if "(" not in p.expression:
            symbol = p.expression.split()[1]
            assert re.search(words[symbol], p.question), p
            assert not p.answer.startswith("-")


def test_the_first_phrasings_leave_the_others_unseen() -> None:
    def wordings(phrasings: int) -> set[str]:
        questions = [problem(index, split="train", seed=0, phrasings=phrasings).question for index in range(2000)]
        return {re.sub(r"\d+", "N", question) for question in questions if "(" not in question}

    few, all_of_them = wordings(2), wordings(4)
    assert len(few) == 5 * 2
    assert few < all_of_them
    assert len(all_of_them) == 5 * 4


def test_problems_depend_on_seed_index_and_split_only() -> None:
    first = [problem(index, split="train", seed=0) for index in range(50)]
    assert first == [problem(index, split="train", seed=0) for index in range(50)]
    assert len(set(first)) == 50
    assert first != [problem(index, split="train", seed=1) for index in range(50)]


def test_documents_hold_training_operands_and_no_chat_format() -> None:
    starts = set()
    for index in range(300):
        text = document(index, seed=0)
        assert text == document(index, seed=0)
        assert 10 <= text.count("\n") <= 25
        assert "<|" not in text
        assert "<tool" not in text
        expressions = re.findall(r"\d+ (?:[-+*%]|//) \(?\d+(?: [-+*] \d+)?", text)
        assert not any(held_out(n) for expression in expressions for n in operands(expression))
        for expression in re.findall(r"^(?:>>> |calculator\()(.*?)\)?$", text, re.MULTILINE):
            assert text.count(expression) >= 2, "every expression is there to be copied"
            assert str(eval(expression + ")" * (expression.count("(") - expression.count(")")))) in text
        starts.add(re.sub(r"[\d().?]+", "", text).split("\n")[0])
    assert len(starts) > 10
    assert document(0, seed=0) != document(0, seed=1)
