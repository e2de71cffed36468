"""What counting alone achieves: unigram and bigram losses that a trained model must beat.

Unigram: p(w) = (c(w) + 1) / (N + V).
Bigram, absolute discounting (Ney, Essen, Kneser 1994), with T(h) the number of different successors of h:
    p(w|h) = max(c(h,w) - d, 0) / c(h) + d T(h) / c(h) p(w),  or p(w) when c(h) = 0,
    d = n1 / (n1 + 2 n2), with n1 and n2 the numbers of bigrams seen once and twice.
"""
# B rows  T tokens  S scored positions  V vocab

from __future__ import annotations

from typing import Any

import numpy as np

from step35.errors import DataError


def unigram_bigram(
    train: np.ndarray[Any, Any],
    rows_BT: np.ndarray[Any, Any],
    segments_BT: np.ndarray[Any, Any],
    vocab_size: int,
) -> tuple[float, float]:
    """Return the mean losses (nats per token) of both models, fitted on the flat stream `train`.

    They are scored where the model is: positions t >= 1 with segments[t] == segments[t-1] >= 0. Raises
    `DataError` when there is no such position or `train` has fewer than two tokens.
    """
    scored = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] >= 0)
    if train.size < 2 or not scored.any():
        raise DataError(
            f"{train.size} training tokens and {scored.sum()} scored positions are too few for baselines; "
            "collect more text (corpus_chars) or hold back more of it (val_tokens)."
        )
    train = train.astype(np.int64)
    history_S = rows_BT[:, :-1][scored].astype(np.int64)
    word_S = rows_BT[:, 1:][scored].astype(np.int64)

    unigram_V = (np.bincount(train, minlength=vocab_size) + 1) / (train.size + vocab_size)
    bigram_S = _bigram(train, history_S, word_S, unigram_V)
    return float(-np.log(unigram_V[word_S]).mean()), float(-np.log(bigram_S).mean())


def _bigram(
    train: np.ndarray[Any, Any],
    history_S: np.ndarray[Any, Any],
    word_S: np.ndarray[Any, Any],
    unigram_V: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """Return p(word | history) for each scored position."""
    vocab_size = unigram_V.size
    # A pair is one number, so that counting pairs is a sort and a look-up is a binary search.
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    history_counts_V = np.bincount(train[:-1], minlength=vocab_size)
    successors_V = np.bincount(pairs // vocab_size, minlength=vocab_size)

    wanted_S = history_S * vocab_size + word_S
    found_S = np.minimum(np.searchsorted(pairs, wanted_S), pairs.size - 1)
    count_S = np.where(pairs[found_S] == wanted_S, counts[found_S], 0)
    total_S = history_counts_V[history_S]
    seen_S = (np.maximum(count_S - discount, 0) + discount * successors_V[history_S] * unigram_V[word_S]) / np.maximum(
        total_S, 1
    )
    result: np.ndarray[Any, Any] = np.where(total_S > 0, seen_S, unigram_V[word_S])
    return result
