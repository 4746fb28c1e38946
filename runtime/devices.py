"""Several GPUs: one pipeline on each, owned by one thread, and work goes to whichever is free.

Everything that touches a GPU happens in its owner's thread, loading and closing included: threads
of one process then never wait for each other's GPU.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, TypeVar

from gentron.errors import BackendError, RequestError
from gentron.runtime.pipeline import Pipeline

T = TypeVar("T")
Job = tuple["Future[Any]", Callable[[Pipeline], Any]]


class Devices:
    """Loads a pipeline on every device at once; `load(device)` makes one."""

    def __init__(self, load: Callable[[int], Pipeline], devices: Sequence[int]):
        """Raises what `load` raised first, after the others were closed, and RequestError for the
        same device twice."""
        if not devices or len(set(devices)) != len(devices):
            raise RequestError("devices", f"must differ, got {','.join(map(str, devices))}")
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.stopping = threading.Event()  # long work looks at it and ends early
        self._closed = False
        loaded: list[Future[None]] = [Future() for _ in devices]
        self._owners = [
            threading.Thread(
                target=self._own, args=(load, device, done), name=f"gpu-{device}", daemon=True
            )
            for device, done in zip(devices, loaded, strict=True)
        ]
        for owner in self._owners:
            owner.start()
        try:
            for done in loaded:
                done.result()
        except BaseException:
            self.close()
            raise

    def submit(self, work: Callable[[Pipeline], T]) -> Future[T]:
        """Runs `work` with the pipeline of the next device that is free, in its owner's thread."""
        if self._closed:
            raise BackendError("the devices are closed; load the bundle again")
        future: Future[T] = Future()
        self._queue.put((future, work))
        return future

    def close(self) -> None:
        """Cancels what waits, sets `stopping` and waits for what runs, frees all; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.stopping.set()
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job[0].cancel()
        for _ in self._owners:
            self._queue.put(None)
        for owner in self._owners:
            owner.join()

    def _own(self, load: Callable[[int], Pipeline], device: int, loaded: Future[None]) -> None:
        try:
            pipeline = load(device)
        except BaseException as error:
            loaded.set_exception(error)
            return
        with pipeline:
            loaded.set_result(None)
            while (job := self._queue.get()) is not None:
                future, work = job
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(work(pipeline))
                    except BaseException as error:
                        future.set_exception(error)
                del job, future, work  # and all that they refer to, while waiting

    def __enter__(self) -> Devices:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def stopped() -> CancelledError:
    """What work raises that ended early because `stopping` was set."""
    return CancelledError("stopped")
