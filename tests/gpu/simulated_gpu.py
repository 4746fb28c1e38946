"""A GPU that is not there: its memory and its stream, simulated so that every misuse is an error.

What a real GPU does silently wrong raises `Fault` here. Queued work runs as late as it may: only
when somebody waits, and then only as far as they wait. Memory knows which of its bytes were ever
written, addresses are never used twice, freed memory is poisoned, and there are gaps around it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from gentron.engines.device import ALIGNMENT, CapturedWork, Device, DeviceMemory, Event, HostMemory
from gentron.errors import ResourceError

POISON = 0xFB  # float32 -2.6e36, float16 -65376 (-61k), int64 far out of every range
STREAM = 0x51
FIRST_ADDRESS = 0x7F00_0000_0000

Range = tuple[int, int]  # of addresses: first, one behind the last
Network = Callable[[list[np.ndarray]], list[np.ndarray]]  # bytes of every tensor


class Fault(AssertionError):
    """What would be wrong results, a hang or a crash on a GPU."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Fault(what)


class SimulatedMemory(DeviceMemory):
    def __init__(self, gpu: SimulatedGpu, address: int, size: int):
        self.gpu, self.address, self.size = gpu, address, size
        self.data = np.full(size, POISON, np.uint8)
        self.known = np.zeros(size, bool)
        self.freeing = self.freed = False

    def free(self) -> None:
        self.gpu.check_held()
        require(not self.freeing, f"device memory {self.address:#x} is freed twice")
        self.freeing = True

        def work() -> None:
            self.freed = True
            self.forget()

        self.gpu.enqueue("free", work)

    def forget(self) -> None:
        self.data[:] = POISON
        self.known[:] = False


class SimulatedHostMemory(HostMemory):
    def __init__(self, gpu: SimulatedGpu, address: int, size: int):
        self.gpu, self.address, self.size = gpu, address, size
        self.data = np.full(size, POISON, np.uint8)
        self.known = np.zeros(size, bool)
        self.reading: list[tuple[int, int]] = []  # by queued copies
        self.writing: list[tuple[int, int]] = []
        self.freed = False

    def put(self, start: int, values: np.ndarray) -> None:
        self._check(start, values.size)
        for kind, ranges in (("reads", self.reading), ("writes", self.writing)):
            require(
                not overlaps((start, start + values.size), ranges),
                f"host memory is written while a queued copy still {kind} it",
            )
        self.data[start : start + values.size] = values
        self.known[start : start + values.size] = True

    def take(self, start: int, size: int) -> np.ndarray:
        self._check(start, size)
        require(
            not overlaps((start, start + size), self.writing),
            "host memory is read before the copy into it was waited for",
        )
        require(self.known[start : start + size].all(), "host memory is read, never written")
        return self.data[start : start + size].copy()

    def free(self) -> None:
        require(not self.freed, "host memory is freed twice")
        require(not self.reading + self.writing, "host memory is freed under a queued copy")
        self.freed = True
        self.gpu.host_blocks.remove(self)

    def forget(self) -> None:
        self.known[:] = False

    def _check(self, start: int, size: int) -> None:
        require(not self.freed, "host memory is used after it was freed")
        require(0 <= start <= start + size <= self.size, "host memory is used beyond its end")


class SimulatedEvent(Event):
    def __init__(self, gpu: SimulatedGpu, position: int):
        self.gpu, self.position = gpu, position

    def wait(self) -> None:
        self.gpu.counts["waits"] += 1
        self.gpu.run_until(self.position)


class SimulatedWork(CapturedWork):
    def __init__(self, gpu: SimulatedGpu, work: list[tuple[str, Callable[[], None]]]):
        self.gpu, self.work, self.freed, self.last = gpu, work, False, 0

    def launch(self) -> None:
        self.gpu.check_held()
        require(not self.freed, "captured work is launched after it was freed")
        self.gpu.counts["launches"] += 1
        for name, work in self.work:
            self.gpu.enqueue(name, work)
        self.last = self.gpu.queued

    def free(self) -> None:
        require(not self.freed, "captured work is freed twice")
        require(self.gpu.executed >= self.last, "captured work is freed while it runs")
        self.freed = True
        self.gpu.captured.remove(self)


class SimulatedGpu(Device):
    def __init__(self, capability: tuple[int, int] = (8, 9), memory: int = 1 << 30):
        super().__init__()
        self.name, self.capability, self.stream = "Simulated GPU", capability, STREAM
        self.memory = memory
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []  # found where nothing can be raised
        self.blocks: list[SimulatedMemory] = []  # by address
        self.host_blocks: list[SimulatedHostMemory] = []
        self.captured: list[SimulatedWork] = []
        self.queue: deque[tuple[str, Callable[[], None]]] = deque()
        self.queued = self.executed = 0
        self.capturing: list[tuple[str, Callable[[], None]]] | None = None
        self.closed = False
        self._next = FIRST_ADDRESS
        self._owner: int | None = None
        self._current = threading.local()

    @contextmanager
    def held(self) -> Iterator[None]:
        with super().held():
            before, self._owner = self._owner, threading.get_ident()
            try:
                yield
            finally:
                self._owner = before

    def make_current(self) -> None:
        self._current.set = True

    def check_held(self) -> None:
        require(not self.closed, "the GPU is used after it was closed")
        require(
            self._owner == threading.get_ident(),
            "the GPU is used by a thread that does not hold it",
        )

    def allocate(self, size: int) -> SimulatedMemory:
        self.check_held()
        require(self.capturing is None, "memory is allocated during a capture")
        if self.used_bytes + size > self.memory:
            raise ResourceError(f"the GPU has no memory left for {size} bytes")
        block = SimulatedMemory(self, self._place(size), size)
        self.blocks.append(block)
        self.counts["allocations"] += 1
        return block

    def allocate_host(self, size: int) -> SimulatedHostMemory:
        self.check_held()
        self.host_blocks.append(SimulatedHostMemory(self, self._place(size), size))
        return self.host_blocks[-1]

    def upload(self, target, offset, source, start, size) -> None:
        self.check_held()
        source._check(start, size)
        self.check_live(target.address + offset, size)
        require(source.known[start : start + size].all(), "a copy to the GPU of unwritten memory")
        reading = (start, start + size)
        source.reading.append(reading)
        self.counts["uploads"] += 1
        self.counts["bytes_up"] += size

        def work() -> None:
            block, at = self.resolve(target.address + offset, size)
            block.data[at : at + size] = source.data[start : start + size]
            block.known[at : at + size] = True
            source.reading.remove(reading)

        self.enqueue("upload", work)

    def download(self, target, source, size) -> None:
        self.check_held()
        target._check(0, size)
        self.check_live(source.address, size)
        writing = (0, size)
        target.writing.append(writing)
        self.counts["downloads"] += 1
        self.counts["bytes_down"] += size

        def work() -> None:
            target.data[:size] = self.read(source.address, size)
            target.known[:size] = True
            target.writing.remove(writing)

        self.enqueue("download", work)

    def clear(self, memory) -> None:
        self.check_held()
        self.check_live(memory.address, memory.size)

        def work() -> None:
            self.write(memory.address, np.zeros(memory.size, np.uint8))

        self.enqueue("clear", work)

    def recycle(self, block) -> None:
        if not block.freed:
            self.enqueue("recycle", block.forget)

    def record(self) -> SimulatedEvent:
        self.check_held()
        return SimulatedEvent(self, self.queued)

    def capture(self, work: Callable[[], None]) -> SimulatedWork:
        self.check_held()
        require(self.capturing is None, "a capture during a capture")
        self.capturing = []
        try:
            work()
            captured = SimulatedWork(self, self.capturing)
        finally:
            self.capturing = None
        self.captured.append(captured)
        self.counts["captures"] += 1
        return captured

    def synchronize(self) -> None:
        self.check_held()
        require(self.capturing is None, "a wait during a capture")
        self.counts["synchronize"] += 1
        self.run_until(self.queued)

    def close(self) -> None:
        if not self.closed:
            with self.held():
                self.run_until(self.queued)
            self.closed = True

    # What the simulated TensorRT uses.

    def enqueue(self, name: str, work: Callable[[], None]) -> None:
        self.check_held()
        if self.capturing is not None:
            self.capturing.append((name, work))
        else:
            self.queue.append((name, work))
            self.queued += 1

    def compute(
        self, network: Network, reads: list[Range], writes: list[Range], scratch: Range | None
    ) -> None:
        """Queues a network: from the bytes at `reads` to those at `writes`; ranges of addresses."""

        def work() -> None:
            read = [self.read(start, stop - start) for start, stop in reads]
            if scratch:
                self.resolve(scratch[0], scratch[1] - scratch[0])[0].forget()
            for (start, _), values in zip(writes, network(read), strict=True):
                self.write(start, values)

        self.enqueue("execute", work)

    def run_until(self, position: int) -> None:
        with self._lock:
            while self.executed < position:
                _, work = self.queue.popleft()
                self.executed += 1
                try:
                    work()
                except Fault:
                    self._abandon()
                    raise

    def check_live(self, address: int, size: int) -> None:
        """For what is being queued now: behind a free that is queued as well."""
        block, _ = self.resolve(address, size)
        require(not block.freeing, f"device memory at {address:#x} is used after it was freed")

    def _abandon(self) -> None:
        """After a fault nothing queued runs any more, as after an error of CUDA."""
        self.queue.clear()
        self.executed = self.queued
        for block in self.host_blocks:
            block.reading.clear()
            block.writing.clear()

    def resolve(self, address: int, size: int) -> tuple[SimulatedMemory, int]:
        """The live block that holds these bytes, and where in it."""
        index = bisect_right(self.blocks, address, key=lambda block: block.address) - 1
        require(index >= 0, f"no device memory at {address:#x}")
        block = self.blocks[index]
        at = address - block.address
        require(at + size <= block.size, f"device memory at {address:#x} is used beyond its end")
        require(not block.freed, f"device memory at {address:#x} is used after it was freed")
        return block, at

    def read(self, address: int, size: int) -> np.ndarray:
        block, at = self.resolve(address, size)
        require(
            block.known[at : at + size].all(),
            f"device memory at {address:#x} is read before anything was written to it",
        )
        return block.data[at : at + size].copy()

    def write(self, address: int, values: np.ndarray) -> None:
        block, at = self.resolve(address, values.size)
        block.data[at : at + values.size] = values
        block.known[at : at + values.size] = True

    @property
    def pending(self) -> list[str]:
        """Names of what is queued and has not run."""
        return [name for name, _ in self.queue]

    @property
    def used_bytes(self) -> int:
        return sum(block.size for block in self.blocks if not block.freeing)

    def leaks(self) -> list[str]:
        found = [f"{block.size} bytes of device memory" for block in self.blocks
                 if not block.freeing]  # fmt: skip
        found += [f"{block.size} bytes of host memory" for block in self.host_blocks]
        return found + ["captured work" for _ in self.captured]

    def _place(self, size: int) -> int:
        address = self._next
        self._next += (size // ALIGNMENT + 2) * ALIGNMENT
        return address


def overlaps(one: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    return any(one[0] < stop and start < one[1] for start, stop in others)
