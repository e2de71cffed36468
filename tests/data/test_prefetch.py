"""Prefetch: the same batches, prepared ahead, whatever is asked for and whatever fails."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.data.packing import Batch
from step35.data.prefetch import Prefetch


class Counting:
    """Rows that hold their own number; remembers who asked for what."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.done = threading.Semaphore(0)

    def rows(self, first: int, count: int) -> Batch:
        self.asked.append((first, count))
        self.threads.add(threading.get_ident())
        self.done.release()
        if first == 13:
            raise OSError("row 13 is damaged")
        tokens = np.arange(first, first + count)[:, None]
        return Batch(tokens, np.zeros_like(tokens), np.zeros_like(tokens, dtype=bool))


@settings(deadline=None)
@given(requests=st.lists(st.tuples(st.integers(14, 30), st.integers(1, 4)), max_size=12))
def test_any_requests_give_what_the_loader_gives(requests: list[tuple[int, int]]) -> None:
    prefetch = Prefetch(Counting())
    for first, count in requests:
        assert prefetch.rows(first, count).tokens[:, 0].tolist() == list(range(first, first + count))


def test_the_next_batch_is_prepared_by_another_thread_and_only_once() -> None:
    loader = Counting()
    prefetch = Prefetch(loader)
    prefetch.rows(0, 3)
    for _ in range(2):
        assert loader.done.acquire(timeout=10)
    assert loader.asked == [(0, 3), (3, 3)]
    prefetch.rows(3, 3)
    assert loader.done.acquire(timeout=10)
    assert loader.asked == [(0, 3), (3, 3), (6, 3)]
    assert threading.get_ident() not in loader.threads
    assert len(loader.threads) == 1


def test_a_batch_of_another_size_is_computed_anew() -> None:
    prefetch = Prefetch(Counting())
    sizes = [2, 2, 4, 1]
    batches = [prefetch.rows(20 + sum(sizes[:n]), size) for n, size in enumerate(sizes)]
    assert [batch.tokens[:, 0].tolist() for batch in batches] == [[20, 21], [22, 23], [24, 25, 26, 27], [28]]


def test_the_thread_and_the_loader_go_with_the_object() -> None:
    before, loader = set(threading.enumerate()), Counting()
    prefetch = Prefetch(loader)
    prefetch.rows(0, 3)
    prefetch.rows(3, 3)
    [thread] = set(threading.enumerate()) - before
    left = weakref.ref(loader)
    del prefetch, loader
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert left() is None


def test_an_error_is_raised_by_the_request_it_belongs_to() -> None:
    prefetch = Prefetch(Counting())
    assert prefetch.rows(10, 3).tokens.size == 3  # prepares row 13, which fails
    with pytest.raises(OSError, match="row 13"):
        prefetch.rows(13, 3)
    with pytest.raises(OSError, match="row 13"):
        prefetch.rows(13, 1)
    assert prefetch.rows(14, 3).tokens.size == 3
    prefetch.rows(11, 2)
    assert prefetch.rows(20, 1).tokens.tolist() == [[20]]  # nobody asks for the row that failed
