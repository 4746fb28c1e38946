"""What engines need of a GPU: memory, one stream, events, captured work. No library's names.

`device_cuda` is the real one. Everything that is queued runs later, in order, on one stream; only
`Event.wait` and `Device.synchronize` wait for it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

ALIGNMENT = 256  # of every tensor's address, in bytes; TensorRT asks for it

Bytes = npt.NDArray[np.uint8]


class DeviceMemory(ABC):
    """A block on the GPU, at an address that is a multiple of `ALIGNMENT`."""

    address: int
    size: int  # bytes

    @abstractmethod
    def free(self) -> None:
        """Once what was queued before has run."""


class HostMemory(ABC):
    """A page-locked block on the host, which the GPU copies from and to while the host goes on."""

    address: int
    size: int

    @abstractmethod
    def put(self, start: int, values: Bytes) -> None:
        """Only where no queued copy still reads."""

    @abstractmethod
    def take(self, start: int, size: int) -> Bytes:
        """A copy; only of what a finished copy has written."""

    @abstractmethod
    def free(self) -> None:
        """Only when no queued copy uses it."""


class Event(ABC):
    """A point in the stream."""

    @abstractmethod
    def wait(self) -> None:
        """Until everything queued before it has run, and not longer. From any thread."""


class CapturedWork(ABC):
    """What was queued once, to be queued again at once, with the same addresses and shapes."""

    @abstractmethod
    def launch(self) -> None: ...

    @abstractmethod
    def free(self) -> None:
        """Only when no launch is still running."""


class Device(ABC):
    """One GPU and one stream on it. Whoever calls anything but `Event.wait` holds the device."""

    name: str
    capability: tuple[int, int]
    stream: int  # the handle that TensorRT takes

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """For this thread alone, with the GPU as its current one."""
        with self._lock:
            self.make_current()
            yield

    @abstractmethod
    def make_current(self) -> None:
        """For the calling thread."""

    @abstractmethod
    def allocate(self, size: int) -> DeviceMemory:
        """Raises ResourceError if the GPU has no room."""

    @abstractmethod
    def allocate_host(self, size: int) -> HostMemory: ...

    @abstractmethod
    def upload(
        self, target: DeviceMemory, offset: int, source: HostMemory, start: int, size: int
    ) -> None:
        """Queues a copy of `size` bytes from the host."""

    @abstractmethod
    def download(self, target: HostMemory, source: DeviceMemory, size: int) -> None:
        """Queues a copy of the first `size` bytes to the host."""

    @abstractmethod
    def clear(self, memory: DeviceMemory) -> None:
        """Queues zeros."""

    def recycle(self, block: DeviceMemory | HostMemory) -> None:  # noqa: B027  none need to care
        """Told that nobody will read what is in the block now."""

    @abstractmethod
    def record(self) -> Event: ...

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> CapturedWork:
        """What `work` queues, without running it."""

    @abstractmethod
    def synchronize(self) -> None:
        """Until everything that was queued has run; raises BackendError if any of it failed."""

    @abstractmethod
    def close(self) -> None:
        """Frees the stream; idempotent, after all memory was freed."""
