"""Loaders: pure functions of (seed, step), epochs that are permutations, segments from document borders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from step35.data.loader import PackedLoader, PretrainLoader, validation
from step35.data.packing import Batch, pack_conversations
from step35.data.shards import ShardWriter, TokenShards
from step35.errors import DataError

CONTEXT = 8
DOCUMENT_LENGTHS = [5, 9, 3, 1, 20, 4, 8, 16]


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    """66 tokens that count up from 0: eight rows and a rest of two."""
    with ShardWriter(tmp_path, 1000, shard_tokens=20) as writer:
        start = 0
        for length in DOCUMENT_LENGTHS:
            writer.add(range(start, start + length), "text")
            start += length
    return TokenShards(tmp_path)


def first_tokens(batches: list[Batch]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch.tokens]


def test_rows_are_windows_with_segments_from_document_borders(shards: TokenShards) -> None:
    batch = validation(shards, CONTEXT, max_rows=100)
    assert batch.tokens.tolist() == np.arange(64).reshape(8, CONTEXT).tolist()
    assert batch.segments[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert batch.segments[1].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert batch.segments[2].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert batch.targets[0].tolist() == [False, True, True, True, True, False, True, True]
    assert batch.targets[2].tolist() == [False, False, False, True, True, True, True, True]
    assert (batch.tokens.dtype, batch.segments.dtype, batch.targets.dtype) == (np.int64, np.int32, np.bool_)


def test_validation_takes_the_first_rows(shards: TokenShards) -> None:
    assert first_tokens([validation(shards, CONTEXT, max_rows=3)]) == [0, 8, 16]


def test_each_epoch_is_another_permutation_of_all_rows(shards: TokenShards) -> None:
    loader = PretrainLoader(shards, CONTEXT, seed=1)
    assert loader.rows_per_epoch == 8
    epochs = [first_tokens([loader.rows(8 * epoch, 4), loader.rows(8 * epoch + 4, 4)]) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(0, 64, CONTEXT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_straddle_epochs_without_losing_a_row(shards: TokenShards) -> None:
    loader = PretrainLoader(shards, CONTEXT, seed=1)
    rows = first_tokens([loader.rows(3 * step, 3) for step in range(8)])
    assert all(sorted(rows[start : start + 8]) == list(range(0, 64, CONTEXT)) for start in (0, 8, 16))


def test_rows_depend_on_seed_and_number_only(shards: TokenShards) -> None:
    loader = PretrainLoader(shards, CONTEXT, seed=1)
    forward = [loader.rows(3 * step, 3).tokens.tolist() for step in range(9)]
    backward = [loader.rows(3 * step, 3).tokens.tolist() for step in reversed(range(9))]
    assert forward == backward[::-1]
    resumed = PretrainLoader(shards, CONTEXT, seed=1).rows(21, 3)
    assert resumed.tokens.tolist() == forward[7]
    other = PretrainLoader(shards, CONTEXT, seed=2)
    assert [other.rows(3 * step, 3).tokens.tolist() for step in range(9)] != forward


def test_too_little_text_is_an_error(shards: TokenShards) -> None:
    with pytest.raises(DataError, match="66 tokens, less than one row of context=67"):
        PretrainLoader(shards, 67, seed=0)
    with pytest.raises(DataError):
        validation(shards, 67, max_rows=1)


def test_packed_loader_serves_every_row_each_epoch() -> None:
    samples = [([number] * CONTEXT, [True] * CONTEXT) for number in range(5)]
    rows, _ = pack_conversations(samples, CONTEXT, pad_id=0)
    loader = PackedLoader(rows, seed=3)
    assert loader.rows_per_epoch == 5
    assert sorted(first_tokens([loader.rows(0, 5)])) == sorted(first_tokens([loader.rows(5, 5)])) == [0, 1, 2, 3, 4]
    assert first_tokens([PackedLoader(rows, 3).rows(5, 5)]) == first_tokens([loader.rows(5, 5)])
    assert loader.rows(0, 5).targets.sum() == 5 * (CONTEXT - 1)
    assert loader.filled == 1.0
    assert (
        PackedLoader(pack_conversations([*samples, ([5] * 2, [True] * 2)], CONTEXT, pad_id=0)[0], 3).filled == 42 / 48
    )


def test_packed_loader_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="no packed rows"):
        PackedLoader([], seed=0)
