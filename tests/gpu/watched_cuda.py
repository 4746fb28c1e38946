"""A real GPU under a network that the host computes: CUDA's own stream, copies, graphs and memory.

What a network does on the stream is a copy of its inputs to the host, a host function that ONNX
Runtime computes in, and a copy of the outputs back; a stream that is captured records the three.
Counts what was asked of the GPU as the simulated one does. Memory that is given on is poisoned, so
that a tensor nobody wrote shows as nonsense.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from gentron.engines.device import CapturedWork, DeviceMemory, Event, HostMemory
from gentron.engines.device_cuda import CudaDevice, CudaHostMemory, CudaMemory

POISON = 0xFB
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class WatchedMemory(CudaMemory):
    def __init__(self, gpu: WatchedCuda, block: CudaMemory):
        super().__init__(block._buffer, block.size, block._stream)
        self.gpu = gpu

    def free(self) -> None:
        del self.gpu.live[self.address]
        super().free()


class WatchedHostMemory(CudaHostMemory):
    def __init__(self, gpu: WatchedCuda, block: CudaHostMemory):
        super().__init__(block._buffer, block.size)
        self.gpu = gpu

    def free(self) -> None:
        self.gpu.host_blocks.remove(self)
        super().free()


class WatchedEvent(Event):
    def __init__(self, gpu: WatchedCuda, event: Event):
        self.gpu, self.event = gpu, event

    def wait(self) -> None:
        self.gpu.counts["waits"] += 1
        self.event.wait()


class WatchedWork(CapturedWork):
    def __init__(self, gpu: WatchedCuda, work: CapturedWork, networks: int):
        self.gpu, self.work, self.networks, self.last = gpu, work, networks, 0

    def launch(self) -> None:
        self.gpu.check_held()
        self.gpu.counts["launches"] += 1
        self.gpu.queued += self.networks
        self.last = self.gpu.queued
        self.work.launch()

    def free(self) -> None:
        if self.gpu.executed < self.last:
            self.gpu.faults.append("captured work is freed while it runs")
        self.gpu.captured.remove(self)
        self.work.free()


class WatchedCuda(CudaDevice):
    def __init__(self) -> None:
        self._owner: int | None = None
        super().__init__()
        # Of the stand-in for TensorRT; the real TensorRT-RTX does not run on every CUDA device.
        self.capability = (8, 9)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.live: dict[int, int] = {}  # sizes by address
        self.host_blocks: list[HostMemory] = []
        self.captured: list[CapturedWork] = []
        self.queued = self.executed = 0  # networks
        self.capturing: list[None] | None = None  # one for each network in it
        self.delay = 0.0  # seconds that a network takes longer
        self.empty = False  # networks write zeros and do nothing else
        self._staging: list[CudaHostMemory] = []  # the last is in use, all may be in captured work
        self._functions: list[object] = []  # that CUDA may still call
        self._closed_here = False

    @contextmanager
    def held(self) -> Iterator[None]:
        with super().held():
            before, self._owner = self._owner, threading.get_ident()
            try:
                yield
            finally:
                self._owner = before

    def check_held(self) -> None:
        assert self._owner == threading.get_ident(), "used by a thread that does not hold the GPU"

    def check_live(self, address: int, size: int) -> None:
        starts = [start for start in self.live if start <= address]
        assert starts, f"no device memory at {address:#x}"
        start = max(starts)
        assert address + size <= start + self.live[start], f"{address:#x} is beyond its block"

    def allocate(self, size: int) -> CudaMemory:
        self.check_held()
        block = WatchedMemory(self, super().allocate(size))
        self.live[block.address] = size
        self.counts["allocations"] += 1
        self._fill(block.address, size)
        return block

    def allocate_host(self, size: int) -> CudaHostMemory:
        self.check_held()
        block = WatchedHostMemory(self, super().allocate_host(size))
        self.host_blocks.append(block)
        return block

    def upload(self, target, offset, source, start, size) -> None:
        self.check_held()
        self.counts["uploads"] += 1
        self.counts["bytes_up"] += size
        super().upload(target, offset, source, start, size)

    def download(self, target, source, size) -> None:
        self.check_held()
        self.counts["downloads"] += 1
        self.counts["bytes_down"] += size
        super().download(target, source, size)

    def recycle(self, block: DeviceMemory | HostMemory) -> None:
        if block.address in self.live:
            self._fill(block.address, block.size)

    def record(self) -> WatchedEvent:
        self.check_held()
        return WatchedEvent(self, super().record())

    def capture(self, work: Callable[[], None]) -> WatchedWork:
        self.check_held()
        self.capturing = []
        try:
            made = super().capture(work)
            captured = WatchedWork(self, made, len(self.capturing))
        finally:
            self.capturing = None
        self.captured.append(captured)
        self.counts["captures"] += 1
        return captured

    def synchronize(self) -> None:
        self.check_held()
        self.counts["synchronize"] += 1
        super().synchronize()

    def close(self) -> None:
        if not self._closed_here:
            self._closed_here = True
            with self.held():
                super().synchronize()
                while self._staging:
                    self._staging.pop().free()
                super().close()

    # What the simulated TensorRT uses, as the simulated GPU has it.

    def compute(self, network, reads, writes, scratch) -> None:
        self.check_held()
        if self.empty:
            for start, stop in writes:
                self._fill(start, stop - start, 0)
            return
        sizes = [stop - start for start, stop in (*reads, *writes)]
        offsets = np.cumsum([0, *((size + 255) // 256 * 256 for size in sizes)]).tolist()
        staging = self._staged(offsets[-1])
        inputs = [(offsets[i], sizes[i]) for i in range(len(reads))]
        outputs = offsets[len(reads) :]

        def run(_: object) -> None:
            try:
                time.sleep(self.delay)
                read = [staging.take(at, size) for at, size in inputs]
                for at, values in zip(outputs[:-1], network(read), strict=True):
                    staging.put(at, values)
            except BaseException as error:  # no exception can leave a host function
                self.faults.append(f"{type(error).__name__}: {error}")
            self.executed += 1

        for (start, _), (at, size) in zip(reads, inputs, strict=True):
            self._copy(staging.address + at, staging, start, self, size)
        if scratch:
            self._fill(scratch[0], scratch[1] - scratch[0])
        self.host_function(run)
        for (start, stop), at in zip(writes, outputs[:-1], strict=True):
            self._copy(start, self, staging.address + at, staging, stop - start)
        if self.capturing is None:
            self.queued += 1
        else:
            self.capturing.append(None)

    def host_function(self, function: Callable[[object], None]) -> None:
        """Queues it; from CUDA's own thread, and in no call of CUDA."""
        pointer = HOST_FUNCTION(function)
        self._functions.append(pointer)
        driver = ctypes.CDLL("libcuda.so.1")
        error = driver.cuLaunchHostFunc(ctypes.c_void_p(self.stream), pointer, None)
        assert error == 0, f"cuLaunchHostFunc: {error}"

    @property
    def pending(self) -> list[str]:
        return ["execute"] * (self.queued - self.executed)

    @property
    def used_bytes(self) -> int:
        return sum(self.live.values())

    def leaks(self) -> list[str]:
        found = [f"{size} bytes of device memory" for size in self.live.values()]
        found += [f"{block.size} bytes of host memory" for block in self.host_blocks]
        return found + ["captured work" for _ in self.captured]

    def _staged(self, size: int) -> CudaHostMemory:
        """One block for every network: what one stream does never overlaps."""
        if not self._staging or self._staging[-1].size < size:
            assert self.capturing is None, "page-locked memory is allocated during a capture"
            self._staging.append(CudaDevice.allocate_host(self, size))
        return self._staging[-1]

    def _fill(self, address: int, size: int, value: int = POISON) -> None:
        view = self._core.Buffer.from_handle(address, size, owner=self)
        view.fill(value, stream=self._stream)


class HostWatchedCuda(WatchedCuda):
    """The same on the stand-in for cuda.core, where everything runs at once."""

    def host_function(self, function: Callable[[object], None]) -> None:
        self._stream.do(lambda: function(None))
