"""Packing: nothing is lost, nothing overflows, nothing shares a segment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.data.packing import pack, pack_conversations, stack

CAPACITY = 16


@given(st.lists(st.integers(0, CAPACITY), max_size=60))
def test_pack_keeps_every_item_within_capacity(lengths: list[int]) -> None:
    bins = pack(lengths, CAPACITY)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in items) for items in bins]
    assert all(items for items in bins)
    assert max(loads, default=0) <= CAPACITY
    # Two bins that would fit into one mean that the second one was opened needlessly.
    assert all(a + b > CAPACITY for n, a in enumerate(loads) for b in loads[n + 1 :])


def test_pack_is_best_fit_with_fixed_ties() -> None:
    assert pack([6, 6, 5, 4, 4, 3], 10) == [[0, 3], [1, 4], [2, 5]]
    # 3 fits in both bins and goes to the fuller one.
    assert pack([7, 6, 3], 10) == [[0, 2], [1]]
    assert pack([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("length", [-1, CAPACITY + 1])
def test_pack_refuses_impossible_lengths(length: int) -> None:
    with pytest.raises(ValueError, match=f"item 1 has length {length}"):
        pack([1, length], CAPACITY)


@given(st.lists(st.integers(0, CAPACITY + 4), min_size=1, max_size=40))
def test_conversations_come_out_whole_and_apart(lengths: list[int]) -> None:
    samples = [
        ([1 + number * 100 + t for t in range(length)], [(number + t) % 3 > 0 for t in range(length)])
        for number, length in enumerate(lengths)
    ]
    rows, left_out = pack_conversations(samples, CAPACITY, pad_id=0)
    fitting = {tuple(ids): mask for ids, mask in samples if 0 < len(ids) <= CAPACITY}
    assert left_out == len(samples) - len(fitting)
    found = []
    for row in rows:
        assert row.tokens.shape == row.segments.shape == row.targets.shape == (CAPACITY,)
        padding = row.segments == -1
        assert (row.tokens[padding] == 0).all()
        assert not row.targets[padding].any()
        for segment in range(row.segments.max() + 1):
            positions = np.flatnonzero(row.segments == segment)
            assert (np.diff(positions) == 1).all()
            ids = tuple(row.tokens[positions].tolist())
            found.append(ids)
            assert row.targets[positions].tolist() == [False, *fitting[ids][1:]]
    assert sorted(found) == sorted(fitting)


def test_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 0"):
        pack_conversations([([1, 2], [True])], CAPACITY, pad_id=0)


def test_stack_gives_the_dtypes_of_a_batch() -> None:
    rows, _ = pack_conversations([([1, 2], [True, True]), ([3] * CAPACITY, [True] * CAPACITY)], CAPACITY, 0)
    batch = stack(rows)
    assert batch.tokens.shape == (2, CAPACITY)
    assert (batch.tokens.dtype, batch.segments.dtype, batch.targets.dtype) == (np.int64, np.int32, np.bool_)
