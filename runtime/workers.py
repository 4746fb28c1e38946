"""A thread of its own for one kind of work, most important first."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)
LAST = 1 << 30


class Worker:
    """Runs what it is given in order of rank, then of arrival."""

    def __init__(self, name: str):
        self._queue: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]]
        self._queue = queue.PriorityQueue()
        self._count = itertools.count()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None], rank: int = 0) -> None:
        """`work` deals with its own errors."""
        self._queue.put((rank, next(self._count), work))

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        """Ends after what was submitted before."""
        self._queue.put((LAST, next(self._count), None))
        self._thread.join()

    def _run(self) -> None:
        while True:
            *_, work = self._queue.get()
            if work is None:
                return
            try:
                work()
            except Exception:
                log.exception("%s: an error that nobody handled", self._thread.name)
            del work  # and all that it refers to, while waiting for the next
