from __future__ import annotations

import re
from pathlib import Path

import pytest

from step35.data import needle as needle_module
from step35.data.needle import document, needles
from step35.data.tokenizer import Tokenizer, load_tokenizer

TINY = Path(__file__).parents[2] / "src" / "step35" / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


def test_a_document_states_its_number_before_it_recalls_it() -> None:
    for index in range(50):
        found = re.findall(r"(The|So the) pass key is (\d{4})\.", document(index, seed=3, characters=1000))
        assert [opening for opening, _ in found] == ["The", "So the", "So the", "So the"]
        assert len({number for _, number in found}) == 1


def test_documents_differ_by_number_and_seed_and_keep_their_length() -> None:
    texts = {document(index, seed=seed, characters=2000) for index in range(5) for seed in range(2)}
    assert len(texts) == 10
    assert all(1950 < len(text) < 2050 for text in texts)
    assert document(4, seed=1) == document(4, seed=1)


def test_the_work_grows_with_the_text_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = 0

    class Line(str):
        def __len__(self) -> int:
            nonlocal measured
            measured += 1
            return super().__len__()

    filler = needle_module._filler
    monkeypatch.setattr(needle_module, "_filler", lambda draw: Line(filler(draw)))
    lines = document(0, seed=0, characters=100_000).count("\n")
    assert measured < 2 * lines


def test_recalls_lie_farther_back_in_longer_texts() -> None:
    def mean_distance(characters: int) -> float:
        texts = [document(index, seed=0, characters=characters) for index in range(100)]
        return sum(text.rindex("So the pass") - text.index("The pass") for text in texts) / 100

    assert mean_distance(4000) > 4 * mean_distance(700)


def test_probes_state_their_answer_once_at_the_depth_they_say(tokenizer: Tokenizer) -> None:
    for needle in needles(tokenizer, context=400, prompts=16, seed=0):
        text = tokenizer.decode(list(needle.ids))
        assert text.endswith("\nSo the pass key is")
        assert text.count(needle.answer) == 1
        lines = text.splitlines()
        place = next(i for i, line in enumerate(lines) if f"The pass key is {needle.answer}." in line)
        assert abs(place / len(lines) - needle.depth) < 0.1
        assert 370 < len(needle.ids) + len(tokenizer.encode(f" {needle.answer}")) <= 400


def test_probes_ask_for_numbers_that_training_never_states(tokenizer: Tokenizer) -> None:
    trained = {n for index in range(3000) for n in re.findall(r"\d{4}", document(index, seed=0, characters=200))}
    asked = {needle.answer for needle in needles(tokenizer, context=300, prompts=64, seed=0)}
    assert len(trained) > 2000
    assert len(asked) > 50
    assert not trained & asked
