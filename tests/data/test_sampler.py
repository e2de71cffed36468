"""The mixture: exact shares, every token once an epoch, rows by number, borders, metadata, and the account."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.data.packing import Batch, fill
from step35.data.sampler import MixtureLoader, SourceAccount, quotas
from step35.data.shards import ShardWriter, TokenShards
from step35.data.stream import SourceStream
from step35.errors import ConfigError, DataError

CONTEXT, ROWS = 16, 8
META = 2
"""Tokens of metadata at the start of each document, or fewer in shorter ones."""
WEIGHTS = {"web": 0.6, "code": 0.3, "small": 0.1}
FIRST = {"web": 0, "code": 40, "small": 90}
"""Number of each source's first document."""


def shards_of(folder: Path, lengths: Sequence[int], first: int = 0, vocab_size: int = 10_000) -> TokenShards:
    """Documents of these lengths; token i of document n is 100 n + i, so each token says where it is from."""
    with ShardWriter(folder, vocab_size, shard_tokens=200) as writer:
        for number, length in enumerate(lengths, start=first):
            writer.add(range(100 * number, 100 * number + length), "text", meta_tokens=min(META, length))
    return TokenShards(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenShards]:
    folder, draw = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    lengths = {"web": draw.integers(1, 40, 30), "code": draw.integers(1, 12, 40), "small": [5]}
    return {name: shards_of(folder / name, [int(n) for n in lengths[name]], FIRST[name]) for name in WEIGHTS}


def loader_of(sources: Mapping[str, TokenShards], **changes: object) -> MixtureLoader:
    values = {"context": CONTEXT, "seed": 1, "window_rows": ROWS} | changes
    return MixtureLoader(sources, WEIGHTS, **values)  # type: ignore[arg-type]


@dataclass
class Documents:
    """What a stream needs to know of token shards."""

    lengths: list[int]
    folder: str = "memory"

    @property
    def total_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def document_starts(self) -> np.ndarray[Any, Any]:
        return np.cumsum([0, *self.lengths[:-1]])

    @property
    def document_lengths(self) -> np.ndarray[Any, Any]:
        return np.array(self.lengths)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 100), max_size=6),
    seed=st.integers(0, 5),
)
def test_a_stream_holds_every_token_once_an_epoch(lengths: list[int], cuts: list[int], seed: int) -> None:
    documents = Documents(lengths)
    stream = SourceStream("web", documents, seed)  # type: ignore[arg-type]
    total = documents.total_tokens
    tokens: list[int] = []
    begun = 0
    for first, end in pairwise(sorted({0, total, 2 * total, *(cut for cut in cuts if cut < 2 * total)})):
        pieces = stream.take(first, end - first)
        assert (pieces.lengths > 0).all()
        assert pieces.lengths.sum() == end - first
        assert stream.begun(first) == begun
        begun += int((pieces.offsets == 0).sum())
        assert (pieces.starts == documents.document_starts[pieces.documents] + pieces.offsets).all()
        assert (pieces.offsets + pieces.lengths <= stream.lengths[pieces.documents]).all()
        for start, length in zip(pieces.starts, pieces.lengths, strict=True):
            tokens += range(start, start + length)
    assert sorted(tokens[:total]) == sorted(tokens[total:]) == list(range(total))
    assert begun == stream.begun(2 * total) == 2 * len(lengths)


def test_epochs_and_sources_have_orders_of_their_own() -> None:
    documents = Documents([3] * 20)
    orders = {
        tuple(SourceStream(name, documents, seed).take(epoch * 60, 60).documents)  # type: ignore[arg-type]
        for name in ("web", "code")
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8


@settings(deadline=None)
@given(
    weights=st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 10), min_size=1),
    tokens=st.integers(10_000, 100_000),
)
def test_quotas_add_up_and_are_within_a_token_of_their_share(weights: dict[str, float], tokens: int) -> None:
    found = quotas(weights, tokens)
    assert sum(found.values()) == tokens
    total = sum(weights.values())
    assert all(abs(found[name] - weight / total * tokens) <= 1 for name, weight in weights.items())


def test_quotas_round_the_largest_remainders_up() -> None:
    assert quotas({"a": 1, "b": 1, "c": 1}, 11) == {"a": 4, "b": 4, "c": 3}
    assert quotas({"a": 0.5, "b": 0.3, "c": 0.2}, 128) == {"a": 64, "b": 38, "c": 26}


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, CONTEXT), min_size=1, max_size=80),
    more=st.data(),
)
def test_fill_leaves_no_hole_and_cuts_only_what_fits_nowhere(lengths: list[int], more: st.DataObject) -> None:
    missing = -sum(lengths) % CONTEXT
    lengths += [missing] if missing else []
    lengths = more.draw(st.permutations(lengths))
    bins = fill(lengths, CONTEXT, sum(lengths) // CONTEXT)
    assert all(sum(length for _, _, length in parts) == CONTEXT for parts in bins)
    tokens = Counter(
        (item, at) for parts in bins for item, first, length in parts for at in range(first, first + length)
    )
    assert tokens == Counter((item, at) for item, length in enumerate(lengths) for at in range(length))
    pieces = sum(map(len, bins))
    assert pieces - len(lengths) < len(bins)  # each cut closes a hole, and the last hole needs none


def test_fill_is_best_fit_and_refuses_what_does_not_add_up() -> None:
    assert fill([6, 6, 4, 4], 10, 2) == [[(0, 0, 6), (2, 0, 4)], [(1, 0, 6), (3, 0, 4)]]
    assert fill([7, 7, 6], 10, 2) == [[(0, 0, 7), (2, 3, 3)], [(1, 0, 7), (2, 0, 3)]]
    with pytest.raises(ValueError, match="do not fill"):
        fill([7, 7], 10, 2)


def source_of(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the number of the source that each token is from."""
    return np.searchsorted(list(FIRST.values()), tokens // 100, side="right") - 1


def test_each_window_holds_exactly_the_quota_of_each_source(sources: dict[str, TokenShards]) -> None:
    loader = loader_of(sources)
    assert loader.quotas == {"web": 77, "code": 38, "small": 13}
    for window in range(40):
        tokens = loader.rows(window * ROWS, ROWS).tokens
        assert np.bincount(source_of(tokens).ravel()).tolist() == [77, 38, 13]


def test_rows_are_full_and_segments_are_runs_of_one_document(sources: dict[str, TokenShards]) -> None:
    batch = loader_of(sources).rows(0, 30 * ROWS)
    assert (batch.tokens.dtype, batch.segments.dtype, batch.targets.dtype) == (np.int64, np.int32, np.bool_)
    assert (batch.segments[:, 0] == 0).all()
    steps = np.diff(batch.segments)
    assert set(np.unique(steps)) == {0, 1}  # no padding, which would be -1
    assert (np.diff(batch.tokens)[steps == 0] == 1).all()  # the next token of the same document
    assert not batch.targets[:, 0].any()
    assert (batch.targets[:, 1:] == (steps == 0)).all()


@settings(deadline=None)
@given(requests=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), min_size=1, max_size=5))
def test_rows_depend_on_seed_and_number_only(
    requests: list[tuple[int, int]], sources: dict[str, TokenShards], in_order: Batch
) -> None:
    asked = loader_of(sources, mask_meta_from=50)
    for first, count in requests:
        batch = asked.rows(first, count)
        for name in ("tokens", "segments", "targets"):
            assert (getattr(batch, name) == getattr(in_order, name)[first : first + count]).all()


@pytest.fixture(scope="module")
def in_order(sources: dict[str, TokenShards]) -> Batch:
    loader = loader_of(sources, mask_meta_from=50)
    rows = [loader.rows(number, 1) for number in range(120)]
    return Batch(*(np.concatenate([getattr(row, n) for row in rows]) for n in ("tokens", "segments", "targets")))


def test_another_seed_gives_other_rows(sources: dict[str, TokenShards]) -> None:
    assert (loader_of(sources).rows(0, ROWS).tokens != loader_of(sources, seed=2).rows(0, ROWS).tokens).any()


def test_metadata_stays_in_context_but_leaves_the_loss_from_the_given_row_on(sources: dict[str, TokenShards]) -> None:
    plain, masked = loader_of(sources).rows(0, 60), loader_of(sources, mask_meta_from=21).rows(0, 60)
    assert (plain.tokens == masked.tokens).all()
    assert (plain.targets[:21] == masked.targets[:21]).all()
    is_meta = plain.tokens % 100 < META
    assert (plain.targets & is_meta)[21:].sum() > 50
    assert (masked.targets == plain.targets & ~is_meta)[21:].all()


@settings(deadline=None)
@given(rows=st.integers(0, 6 * ROWS))
def test_the_account_is_what_a_count_of_the_rows_gives(rows: int, sources: dict[str, TokenShards]) -> None:
    loader = loader_of(sources)
    account = loader.account(rows)
    tokens = loader.rows(0, 6 * ROWS).tokens[:rows]
    for number, (name, shards) in enumerate(sources.items()):
        own = tokens[source_of(tokens) == number]
        documents = (own % 100 == 0).sum()
        assert account[name] == SourceAccount(int(documents), own.size, own.size / shards.total_tokens)


def test_a_later_stage_goes_on_where_the_one_before_stopped(sources: dict[str, TokenShards]) -> None:
    first = loader_of(sources)
    stage = loader_of(sources, start=first.behind(2 * ROWS - 3))
    assert first.behind(2 * ROWS) == first.behind(2 * ROWS - 3) == {"web": 154, "code": 76, "small": 26}
    longer = first.rows(0, 4 * ROWS).tokens
    both = np.concatenate([first.rows(0, 2 * ROWS).tokens, stage.rows(0, 2 * ROWS).tokens])
    assert Counter(longer.ravel().tolist()) == Counter(both.ravel().tolist())


def test_packing_cuts_few_documents_that_fit(sources: dict[str, TokenShards]) -> None:
    loader = loader_of(sources, window_rows=512)
    figures = loader.packing(2)
    batch = loader.rows(0, 1024)
    assert figures.pieces_per_row == 1 + (np.diff(batch.segments) > 0).sum() / 1024
    assert figures.targets == batch.targets.mean()
    assert figures.cut < 0.01


def test_old_shards_load_but_their_metadata_cannot_be_masked(sources: dict[str, TokenShards], tmp_path: Path) -> None:
    folder = shutil.copytree(sources["web"].folder, tmp_path / "web")
    index = json.loads((folder / "index.json").read_text())
    del index["meta_tokens"]
    (folder / "index.json").write_text(json.dumps(index))
    for path in folder.glob("*.meta.npy"):
        path.unlink()
    old = sources | {"web": TokenShards(folder)}
    assert (loader_of(old).rows(0, 50).targets == loader_of(sources).rows(0, 50).targets).all()
    with pytest.raises(DataError, match=r"do not say which tokens are metadata.*step35 prepare"):
        loader_of(old, mask_meta_from=1_000)


def test_what_cannot_be_mixed_is_refused(sources: dict[str, TokenShards], tmp_path: Path) -> None:
    def mix(weights: dict[str, float], **more: TokenShards) -> MixtureLoader:
        return MixtureLoader(sources | more, weights, context=CONTEXT, seed=0, window_rows=ROWS)

    with pytest.raises(ConfigError, match=r"no source is called 'wep'\. Did you mean 'web'"):
        mix({"wep": 1})
    with pytest.raises(ConfigError, match="above 0"):
        mix({"web": 1, "code": 0})
    with pytest.raises(ConfigError, match="less than one of the 128 tokens"):
        mix({"web": 1, "code": 1e-6})
    with pytest.raises(DataError, match="different vocabularies"):
        mix({"web": 1, "other": 1}, other=shards_of(tmp_path / "other", [3], vocab_size=77))
    with pytest.raises(DataError, match="holds no tokens"):
        mix({"empty": 1}, empty=shards_of(tmp_path / "empty", []))
