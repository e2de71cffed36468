"""Baselines against a loop that spells the formula out."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from step35.data.baselines import unigram_bigram
from step35.errors import DataError

VOCAB = 7


def loop_probabilities(train: list[int], history: int, word: int) -> tuple[float, float]:
    counts, pairs = Counter(train), Counter(pairwise(train))
    unigram = (counts[word] + 1) / (len(train) + VOCAB)
    once = sum(count == 1 for count in pairs.values())
    twice = sum(count == 2 for count in pairs.values())
    discount = once / (once + 2 * twice) if once else 0.5
    followers = {pair[1]: count for pair, count in pairs.items() if pair[0] == history}
    total = sum(followers.values())
    if not total:
        return unigram, unigram
    kept = max(followers.get(word, 0) - discount, 0) / total
    return unigram, kept + discount * len(followers) / total * unigram


@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force_on_scored_positions_only(seed: int) -> None:
    rng = np.random.default_rng(seed)
    train = rng.choice(VOCAB - 1, size=60, p=[0.5, 0.2, 0.15, 0.1, 0.04, 0.01]).astype(np.uint16)
    rows = rng.integers(0, VOCAB, size=(3, 12))  # token 6 never occurs in training
    segments = np.sort(rng.integers(-1, 3, size=(3, 12)), axis=1)
    losses = []
    for row, segment in zip(rows, segments, strict=True):
        for t in range(1, 12):
            if segment[t] == segment[t - 1] and segment[t] >= 0:
                losses.append([-math.log(p) for p in loop_probabilities(train.tolist(), row[t - 1], row[t])])
    expected = np.mean(losses, axis=0)
    assert unigram_bigram(train, rows, segments, VOCAB) == pytest.approx(tuple(expected), rel=1e-12)


@pytest.mark.parametrize("history", range(VOCAB))
def test_both_are_distributions(history: int) -> None:
    train = np.array([0, 1, 2, 0, 1, 3, 0, 1, 2, 5, 5, 4])
    sums = np.zeros(2)
    for word in range(VOCAB):
        losses = unigram_bigram(train, np.array([[history, word]]), np.zeros((1, 2), int), VOCAB)
        sums += np.exp(-np.array(losses))
    assert sums == pytest.approx([1.0, 1.0])


def test_bigram_learns_what_unigram_cannot() -> None:
    train = np.tile(np.arange(VOCAB), 200)
    rows = np.tile(np.arange(VOCAB), 3)[None]
    unigram, bigram = unigram_bigram(train, rows, np.zeros_like(rows), VOCAB)
    assert unigram == pytest.approx(math.log(VOCAB), abs=1e-3)
    assert bigram < 0.05


def test_nothing_to_score_is_an_error() -> None:
    rows = np.array([[1, 2, 3]])
    with pytest.raises(DataError, match="too few"):
        unigram_bigram(np.arange(5), rows, np.array([[0, 1, -1]]), VOCAB)
