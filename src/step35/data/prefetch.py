"""Prepares the next batch in a thread while the current one is trained on, so that packing costs no step time."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from step35.data.loader import Loader
from step35.data.packing import Batch


class Prefetch:
    """A loader that returns what `loader` returns; after rows (first, count) it prepares (first + count, count).

    Any other request is computed when it comes. An error in the thread is raised by the request that it belongs to.
    The thread and what it has prepared go with the object.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        # One thread: the loader beneath is never asked for two things at a time.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count - 1`."""
        prepared, self._ahead = self._ahead, None
        if prepared and prepared[0] != (first, count):
            prepared[1].cancel()
            prepared = None
        future = prepared[1] if prepared else self._thread.submit(self._loader.rows, first, count)
        batch = future.result()
        following = (first + count, count)
        self._ahead = following, self._thread.submit(self._loader.rows, *following)
        return batch
