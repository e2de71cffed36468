"""The compiled kernels against plain attention in fp64, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step35.model import attention_kernels as plain
from step35.model.compiled import library
from step35.model.compiled.attention import attend_spans
from step35.model.compiled.grouped import Grouped
from step35.model.context import Context
from step35.runtime import compiled as builder
from step35.runtime.compiled import find_compiler
from step35.runtime.machine import cpu_flags

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")


def heads(batch: int, tokens: int, query: int, kv: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return queries, keys and values as one tensor, as a layer's projection gives them."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, query + 2 * kv, size, generator=random).to(dtype)


def run(qkv: Tensor, query: int, segments: Tensor, window: int | None, reference: bool) -> list[Tensor]:
    """Return the output and the gradient of the projection's result."""
    qkv = (qkv.double() if reference else qkv).clone().requires_grad_()
    kv = (qkv.shape[2] - query) // 2
    q, k, v = qkv.split([query, kv, kv], dim=2)
    if reference:
        positions = torch.arange(qkv.shape[1]).expand(segments.shape)
        mask = plain.visible(positions, positions, window) & plain.same_document(*2 * [plain.documents(segments)])
        y = plain.attend(q, k, v, mask)
    else:
        assert library.fits(q)
        y = attend_spans(q, k, v, *plain.spans(segments, window))
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    y.backward(direction.to(y.dtype))
    return [y.detach(), qkv.grad]


def error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 17, 64, 200])
@pytest.mark.parametrize(
    ("batch", "tokens", "query", "kv", "size"),
    [
        (2, 1, 2, 1, 16),
        (1, 7, 4, 4, 32),
        (2, 65, 6, 2, 32),
        (1, 193, 4, 2, 64),
        (1, 300, 2, 1, 128),
        (3, 128, 3, 1, 48),
    ],
)
def test_spans_equal_the_reference(
    batch: int, tokens: int, query: int, kv: int, size: int, window: int | None, dtype: torch.dtype
) -> None:
    segments = torch.zeros(batch, tokens, dtype=torch.long)
    segments[0, tokens // 3 :], segments[0, tokens // 2 :], segments[-1, tokens - 4 :] = 1, 2, -1
    qkv = heads(batch, tokens, query, kv, size, dtype)
    pairs = zip(*(run(qkv, query, segments, window, reference) for reference in (False, True)), strict=True)
    assert max(error(*pair) for pair in pairs) < (1e-6 if dtype == torch.float32 else 5e-3)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 120),
    group=st.integers(1, 3),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_any_documents_and_windows(lengths: list[int], window: int | None, group: int, scale: float) -> None:
    # Scores of up to some thousand: the maximum must be taken off before the exponential, block by block.
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    qkv = heads(1, sum(lengths), group, 1, 16, torch.float32) * scale
    pairs = zip(*(run(qkv, group, segments, window, reference) for reference in (False, True)), strict=True)
    assert max(error(*pair) for pair in pairs) < 2e-6 * max(1, scale**2)


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_neighbours_change_a_bit(dtype: torch.dtype) -> None:
    qkv = heads(3, 150, 6, 2, 32, dtype)
    segments = torch.zeros(3, 150, dtype=torch.long)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(qkv, 6, segments, 40, reference=False))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    y = attend_spans(*qkv[1:2].split([6, 2, 2], dim=2), *plain.spans(segments[1:2], 40))
    assert torch.equal(y, results[0][0][1:2])


def test_hidden_keys_change_nothing() -> None:
    qkv = heads(1, 100, 2, 1, 16, torch.float32)
    spans = plain.spans(torch.zeros(1, 100, dtype=torch.long), 20)
    before = attend_spans(*qkv.split([2, 1, 1], dim=2), *spans)
    qkv[:, 40, 2:] = 1e30  # key and value
    after = attend_spans(*qkv.split([2, 1, 1], dim=2), *spans)
    rows = torch.arange(100)
    assert torch.equal(((before != after).any(-1).any(-1))[0], (rows >= 40) & (rows < 60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_no_number_stays_no_number(part: str, dtype: torch.dtype) -> None:
    qkv = heads(1, 150, 2, 1, 16, dtype)
    qkv[0, 70, {"query": 0, "key": 2, "value": 3}[part], 3] = torch.nan
    y = attend_spans(*qkv.split([2, 1, 1], dim=2), *plain.spans(torch.zeros(1, 150, dtype=torch.long), 20))
    bad = y.isnan().any(-1)[0]
    if part == "query":
        assert bad.nonzero().tolist() == [[70, 0]]
    else:
        assert bad[70:90].all()  # those that see the key; neighbours may follow, since 0 times NaN is NaN
        assert not bad[:32].any()
        assert not bad[128:].any()


def test_the_first_row_seen_is_the_later_of_document_and_window() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
    for window, first in ((None, [0, 0, 0, 3, 3, 3, 3, 7]), (2, [0, 0, 1, 3, 3, 4, 5, 7])):
        assert [x.tolist() for x in plain.spans(segments, window)] == [[first], [list(range(8))]]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), keys=st.integers(1, 200), queries=st.integers(1, 80))
def test_any_spans(data: st.DataObject, keys: int, queries: int) -> None:
    # As many keys as a cache holds, with gradients: nothing ties a query's row to a key's.
    rows = st.lists(st.integers(0, keys - 1), min_size=queries, max_size=queries).map(sorted)
    first, last = data.draw(rows), data.draw(rows)
    first = [min(a, b) for a, b in zip(first, last, strict=True)]
    heads_q, heads_kv = heads(1, queries, 4, 0, 16, torch.float32), heads(1, keys, 0, 2, 16, torch.float32, seed=1)
    row = torch.arange(keys)
    mask = (row >= torch.tensor(first)[:, None]) & (row <= torch.tensor(last)[:, None])
    results = []
    for reference in (False, True):
        q, k, v = (x.double() if reference else x for x in (heads_q, *heads_kv.split(2, dim=2)))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        spans = (torch.tensor([x], dtype=torch.int32) for x in (first, last))
        y = plain.attend(*leaves, mask[None]) if reference else attend_spans(*leaves, *spans)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("march", "flag"), [("x86-64-v3", "avx2"), ("x86-64-v4", "avx512bw")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_built_for_lesser_cpus(
    march: str, flag: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # 8 lanes, and 16 without products of bf16 pairs.
    if flag not in cpu_flags():
        pytest.skip(f"needs a CPU with {flag}")
    flags = [f"-march={march}" if flag == "-march=native" else flag for flag in builder.FLAGS]
    monkeypatch.setattr(builder, "FLAGS", tuple(flags))
    monkeypatch.setattr(builder, "cache_folder", lambda: tmp_path)
    made = library.Libraries(*(builder.load_library.__wrapped__(source, "a test") for source in library.SOURCES))
    monkeypatch.setattr(library, "libraries", lambda: made)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor([70, 1, 129]))[None]
    for window in (None, 33):
        qkv = heads(1, 200, 6, 2, 48, dtype)
        pairs = zip(*(run(qkv, 6, segments, window, reference) for reference in (False, True)), strict=True)
        assert max(error(*pair) for pair in pairs) < (1e-6 if dtype == torch.float32 else 5e-3)
    rows, weight = heads(1, 90, 1, 0, 64, dtype)[0, :, 0], heads(3, 48, 1, 0, 64, dtype, seed=1)[:, :, 0].contiguous()
    ours = Grouped.apply(rows, weight, torch.tensor([33, 33, 90]).int())
    exact = torch.cat([rows[:33].double() @ weight[0].double().T, rows[33:].double() @ weight[2].double().T])
    assert error(ours, exact) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_what_does_not_fit_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q = heads(1, 8, 2, 1, 16, torch.float32)[:, :, :2]
    assert library.fits(q)
    assert not library.fits(q.double())
    assert not library.fits(q[..., :8])
    assert not library.fits(q[:, :0])
    monkeypatch.setattr(library, "libraries", lambda: None)
    assert not library.fits(q)


@pytest.mark.parametrize("sliding", [False, True])
def test_a_layer_gives_the_same_with_and_without_the_compiler(
    sliding: bool, make_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = make_model().layers[1 if sliding else 0].attention
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(3))
    segments = torch.zeros(2, 50, dtype=torch.long)
    segments[:, 30:] = 1
    context = Context.packed(torch.zeros(2, 50, dtype=torch.long), segments)
    ours = attention(x, context)
    monkeypatch.setattr(library, "libraries", lambda: None)
    torch.testing.assert_close(ours, attention(x, context), rtol=1e-5, atol=1e-6)
