from __future__ import annotations

import re
from pathlib import Path

import pytest

from step35.data.needle import document, needles
from step35.data.tokenizer import Tokenizer, load_tokenizer

TINY = Path(__file__).parents[2] / "src" / "step35" / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


def test_a_document_recalls_only_what_it_stated() -> None:
    recalled = 0
    for index in range(50):
        facts: dict[str, str] = {}
        for line in document(index, seed=3, characters=1000).splitlines():
            if found := re.fullmatch(r"Recall: the key of the (.*) is (\d{4})\.", line):
                assert facts[found[1]] == found[2]
                recalled += 1
            elif found := re.fullmatch(r"The key of the (.*) is (\d{4})\.", line):
                facts[found[1]] = found[2]
    assert recalled > 200


def test_documents_differ_by_number_and_seed_and_keep_their_length() -> None:
    texts = {document(index, seed=seed, characters=2000) for index in range(5) for seed in range(2)}
    assert len(texts) == 10
    assert all(2000 <= len(text) < 2100 for text in texts)
    assert document(4, seed=1) == document(4, seed=1)


def test_probes_state_their_answer_once_at_the_depth_they_say(tokenizer: Tokenizer) -> None:
    for needle in needles(tokenizer, context=400, prompts=16, seed=0):
        text = tokenizer.decode(list(needle.ids))
        name = re.search(r"Recall: the key of the (.*) is$", text)
        assert name is not None
        fact = f"The key of the {name[1]} is {needle.answer}."
        assert text.count(fact) == 1
        lines = text.splitlines()
        assert abs(next(i for i, line in enumerate(lines) if fact in line) / len(lines) - needle.depth) < 0.1
        assert 360 < len(needle.ids) + len(tokenizer.encode(f" {needle.answer}")) <= 400


def test_probes_ask_for_names_that_training_never_sees(tokenizer: Tokenizer) -> None:
    names = re.compile(r"key of the (.*?) is")
    trained = {name for index in range(300) for name in names.findall(document(index, seed=0))}
    asked = {n for needle in needles(tokenizer, context=300, prompts=20, seed=0) for n in names.findall(
        tokenizer.decode(list(needle.ids)))}  # fmt: skip
    assert len(trained) > 1000
    assert len(asked) > 40
    assert not trained & asked
