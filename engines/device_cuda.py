"""`Device` through cuda.core: the only file that computes with CUDA. No torch, no cupy.

Whatever CUDA reports becomes a BackendError, or a ResourceError where memory ran out. An error of
queued work appears at the next wait, and leaves the GPU unusable for this process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gentron.engines.device import (
    ALIGNMENT,
    Bytes,
    CapturedWork,
    Device,
    DeviceMemory,
    Event,
    HostMemory,
)
from gentron.errors import BackendError, GenTronError, ResourceError

DRIVERS = ("libcuda.so.1", "nvcuda.dll")
OUT_OF_MEMORY = ("OUT_OF_MEMORY", "out of memory", "MEMORY_ALLOCATION")


def driver_missing() -> str:
    """Why CUDA cannot be used by anybody on this machine, or nothing; takes no time to find out."""
    for name in DRIVERS:
        try:
            ctypes.CDLL(name)
            return ""
        except OSError:
            continue
    return "no NVIDIA driver (libcuda.so.1 is not there): install one, and check with nvidia-smi"


def is_installed(module: str) -> bool:
    """Imports at most what the module is part of."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


@contextmanager
def reported(what: str) -> Iterator[None]:
    """cuda.core raises RuntimeErrors of several libraries."""
    try:
        yield
    except GenTronError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if any(words in text for words in OUT_OF_MEMORY):
            raise ResourceError(
                f"the GPU has no memory left for {what}; ask for a smaller --size or fewer "
                "pictures at once, or close what else runs on it (nvidia-smi lists it)"
            ) from error
        raise BackendError(
            f"the GPU failed at {what} ({type(error).__name__}: {text}); start again, and if it "
            "comes back look at nvidia-smi and the system's log"
        ) from error


class CudaMemory(DeviceMemory):
    def __init__(self, buffer: Any, size: int, stream: Any):
        self._buffer, self._stream = buffer, stream
        self.address, self.size = int(buffer.handle), size
        assert self.address % ALIGNMENT == 0, self.address

    def free(self) -> None:
        with reported("freeing memory"):
            self._buffer.close(self._stream)


class CudaHostMemory(HostMemory):
    def __init__(self, buffer: Any, size: int):
        self._buffer = buffer
        self.address, self.size = int(buffer.handle), size
        raw = (ctypes.c_uint8 * size).from_address(self.address)
        self._bytes: Bytes = np.ctypeslib.as_array(raw)

    def put(self, start: int, values: Bytes) -> None:
        self._bytes[start : start + values.size] = values

    def take(self, start: int, size: int) -> Bytes:
        return self._bytes[start : start + size].copy()

    def free(self) -> None:
        with reported("freeing memory of the host"):
            self._buffer.close()


class CudaEvent(Event):
    def __init__(self, event: Any, make_current: Callable[[], None]):
        self._event, self._make_current = event, make_current

    def wait(self) -> None:
        self._make_current()
        with reported("computing"):
            self._event.sync()


class CudaWork(CapturedWork):
    def __init__(self, graph: Any, stream: Any):
        self._graph, self._stream = graph, stream

    def launch(self) -> None:
        with reported("launching captured work"):
            self._graph.launch(self._stream)

    def free(self) -> None:
        with reported("freeing captured work"):
            self._graph.close()


class CudaDevice(Device):
    def __init__(self, index: int = 0):
        """Raises BackendError where there is no driver, no cuda.core or no such GPU."""
        super().__init__()
        if missing := driver_missing():
            raise BackendError(missing)
        try:
            from cuda import core
        except ImportError as error:
            raise BackendError(
                f"cuda.core cannot be imported ({error}); run: pip install 'cuda-core>=1.0,<2'"
            ) from error
        self._core, self._current = core, threading.local()
        with reported("finding the GPU"):
            self._device = core.Device(index)
            self.make_current()
            major, minor = self._device.compute_capability
            self.name, self.capability = str(self._device.name), (int(major), int(minor))
            self._stream = self._device.create_stream(options=core.StreamOptions(nonblocking=True))
            self._pinned = core.LegacyPinnedMemoryResource()
        self.stream = int(self._stream.handle)
        self._closed = False

    def make_current(self) -> None:
        if not getattr(self._current, "set", False):
            with reported("choosing the GPU"):
                self._device.set_current()
            self._current.set = True

    def allocate(self, size: int) -> CudaMemory:
        with reported(f"{size / 1e6:.1f} MB"):
            buffer = self._device.allocate(size, stream=self._stream)
        return CudaMemory(buffer, size, self._stream)

    def allocate_host(self, size: int) -> CudaHostMemory:
        with reported(f"{size / 1e6:.1f} MB of page-locked memory"):
            return CudaHostMemory(self._pinned.allocate(size), size)

    def upload(
        self, target: DeviceMemory, offset: int, source: HostMemory, start: int, size: int
    ) -> None:
        with reported("copying to the GPU"):
            self._copy(target.address + offset, target, source.address + start, source, size)

    def download(self, target: HostMemory, source: DeviceMemory, size: int) -> None:
        with reported("copying from the GPU"):
            self._copy(target.address, target, source.address, source, size)

    def _copy(self, to: int, to_owner: object, at: int, at_owner: object, size: int) -> None:
        view = self._core.Buffer.from_handle
        source = view(at, size, owner=at_owner)
        source.copy_to(view(to, size, owner=to_owner), stream=self._stream)

    def clear(self, memory: DeviceMemory) -> None:
        view = self._core.Buffer.from_handle(memory.address, memory.size, owner=memory)
        with reported("clearing memory"):
            view.fill(0, stream=self._stream)

    def record(self) -> CudaEvent:
        with reported("recording an event"):
            return CudaEvent(self._stream.record(), self.make_current)

    def capture(self, work: Callable[[], None]) -> CudaWork:
        with reported("capturing"):
            builder = self._stream.create_graph_builder()
            builder.begin_building("thread_local")
            try:
                work()
            finally:
                # Also after an error: the stream must not stay in capture.
                builder.end_building()
            graph = builder.complete()
            graph.upload(self._stream)
        return CudaWork(graph, self._stream)

    def synchronize(self) -> None:
        with reported("computing"):
            self._stream.sync()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with reported("closing its stream"):
                self._stream.close()
