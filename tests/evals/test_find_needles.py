from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.data.tokenizer import Tokenizer, load_tokenizer
from step35.evals.needle import DEPTHS, find_needles

TINY = Path(__file__).parents[2] / "src" / "step35" / "assets" / "tiny"


class Reader:
    """Answers from the last `sight` tokens of the prompt."""

    def __init__(self, tokenizer: Tokenizer, sight: int) -> None:
        self.tokenizer, self.sight = tokenizer, sight

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        return [Completion(tuple(self.tokenizer.encode(self.answer(p))), (), "length") for p in prompts]

    def answer(self, prompt: Sequence[int]) -> str:
        found = re.search(r"The pass key is (\d+)", self.tokenizer.decode(list(prompt)[-self.sight :]))
        return f" {found[1]}." if found else " 0."

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise NotImplementedError

    def update_weights(self, state: Mapping[str, Any], version: int) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("sight", "expected"), [(10_000, 1.0), (260, 0.5), (1, 0.0)])
def test_accuracy_is_what_the_reader_can_see(sight: int, expected: float) -> None:
    tokenizer = load_tokenizer(TINY)
    found = find_needles(Reader(tokenizer, sight), tokenizer, context=512, prompts=40, seed=0)
    assert found["accuracy"] == pytest.approx(expected, abs=0.1)
    assert found["low"] <= found["accuracy"] <= found["high"]
    assert len(found["by_depth"]) == DEPTHS
    assert found["by_depth"][0] == (1.0 if sight > 512 else 0.0)
    assert found["by_depth"][-1] == (1.0 if sight > 100 else 0.0)
