"""The synthetic corpus has the statistics it states."""

from itertools import pairwise

import numpy as np
import pytest

from corpus import A, B, Corpus


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_bigram_has_its_share_and_a_is_always_followed_by_b(share: float) -> None:
    tokens = Corpus(bigram_share=share).batch(0, 64, 256).tokens
    assert (tokens == A).mean() == pytest.approx(share, rel=0.1)
    before, after = tokens[:, :-1], tokens[:, 1:]
    assert (after[before == A] == B).all()
    assert (before[after == B] == A).all()


def test_without_bigram_neither_token_occurs() -> None:
    assert Corpus().batch(0, 16, 256).tokens.min() > B


def test_other_tokens_follow_the_chain_of_one_domain() -> None:
    corpus = Corpus(domains=3, successors=2)
    tokens, tables = corpus.batch(0, 32, 64).tokens, corpus.tables()
    for row in tokens:
        pairs = list(pairwise(row))
        assert any(all(after in table[before] for before, after in pairs) for table in tables)


def test_batches_are_a_function_of_seed_and_step() -> None:
    first = Corpus(seed=3).batch(5, 4, 32).tokens
    assert np.array_equal(first, Corpus(seed=3).batch(5, 4, 32).tokens)
    assert not np.array_equal(first, Corpus(seed=3).batch(6, 4, 32).tokens)
    assert not np.array_equal(first, Corpus(seed=4).batch(5, 4, 32).tokens)
