"""Tensors in a GPU's memory, and the host memory that they are written from and read into.

Memory that a tensor no longer needs is kept and given to the next of its size, the oldest block
first: so the same request meets the same addresses again, and work that was captured with them can
be used again. All of it is used in the order of one stream, so it may be given on at once.
"""

from __future__ import annotations

import gc
import heapq
import math
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from gentron.contract import Component
from gentron.engines.base import Array, Buffer
from gentron.engines.device import ALIGNMENT, Bytes, Device, DeviceMemory, Event, HostMemory
from gentron.errors import BackendError, ResourceError

SEGMENT, SEGMENTS = 1 << 20, 8  # bytes and number: page-locked memory that writes go through
SMALL = 4096  # bytes
IDLE = 1 << 29  # bytes kept for tensors to come; above it everything idle is freed

Block = TypeVar("Block", DeviceMemory, HostMemory)
Forget = Callable[[set[int]], None]  # told of addresses, before they are freed


class Pool(Generic[Block]):
    """Blocks by size. Whoever calls anything but `give_back` holds the device."""

    def __init__(self, device: Device, allocate: Callable[[int], Block]):
        self._device = device
        self._allocate: Callable[[int], Block] = allocate
        self._idle: dict[int, list[tuple[int, Block]]] = {}  # heaps by age, for each size
        self._used: dict[int, tuple[int, Block]] = {}  # by address
        self._made = 0  # blocks so far, which numbers them
        self._returned: deque[Block] = deque()
        self._idle_bytes = 0
        self.forget: Forget = lambda addresses: None

    def take(self, size: int) -> Block:
        size = max(ALIGNMENT, math.ceil(size / ALIGNMENT) * ALIGNMENT)
        self._collect()
        if self._idle.get(size):
            number, block = heapq.heappop(self._idle[size])
            self._idle_bytes -= size
        else:
            if self._idle_bytes > IDLE:
                self.trim()
            try:
                block = self._allocate(size)
            except ResourceError:
                gc.collect()  # a request that was dropped halfway is a cycle, with all its tensors
                self.trim()
                block = self._allocate(size)
            number, self._made = self._made, self._made + 1
        self._used[block.address] = number, block
        return block

    def give_back(self, block: Block) -> None:
        """From any thread at any time, from the garbage collector too: takes no lock."""
        self._returned.append(block)

    def trim(self) -> None:
        """Frees what is idle."""
        self._collect()
        idle = [block for heap in self._idle.values() for _, block in heap]
        self._idle, self._idle_bytes = {}, 0
        if idle:
            self._device.synchronize()
            self.forget({block.address for block in idle})
        for block in idle:
            block.free()

    def close(self) -> None:
        """Frees everything, in use or not."""
        self.trim()
        while self._used:
            self._used.popitem()[1][1].free()

    @property
    def used_bytes(self) -> int:
        with self._device.held():
            self._collect()
            return sum(block.size for _, block in self._used.values())

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            number, owned = self._used.get(block.address, (0, None))
            if owned is block:
                del self._used[block.address]
                heapq.heappush(self._idle.setdefault(block.size, []), (number, block))
                self._idle_bytes += block.size
                self._device.recycle(block)


class Staging:
    """Page-locked memory in segments: a write is copied here and queued, and the host goes on.

    A segment is written again only when the copies from it are done; the fence behind them is made
    when it is left, so that small writes cost no event.
    """

    def __init__(self, device: Device, segment: int = SEGMENT, segments: int = SEGMENTS):
        self._device, self._segment, self._segments = device, segment, segments
        self._memory = device.allocate_host(segment * segments)
        self._current = self._filled = 0
        self._fences: dict[int, Event] = {}

    def send(self, target: DeviceMemory, values: Bytes, offset: int = 0) -> None:
        """`offset` in bytes into the target."""
        for start in range(0, values.size, self._segment):
            part = values[start : start + self._segment]
            at = self._room(part.size)
            self._memory.put(at, part)
            self._device.upload(target, offset + start, self._memory, at, part.size)

    def _room(self, size: int) -> int:
        if self._filled + size > self._segment:
            self._fences[self._current] = self._device.record()
            self._current, self._filled = (self._current + 1) % self._segments, 0
            if fence := self._fences.pop(self._current, None):
                fence.wait()
        at = self._current * self._segment + self._filled
        self._filled += math.ceil(size / 16) * 16
        return at

    def free(self) -> None:
        self._memory.free()


class Arena:
    """All memory of one backend on one device: tensors, what they pass through, and scratch."""

    def __init__(self, device: Device):
        self.device, self.closed = device, False
        self.holders: list[Forget] = []  # of addresses: engines with captured work
        with device.held():
            self.tensors: Pool[DeviceMemory] = Pool(device, device.allocate)
            self.landing: Pool[HostMemory] = Pool(device, device.allocate_host)
            self.staging = Staging(device)
        self.tensors.forget = self._forget
        self._scratch: DeviceMemory | None = None

    def scratch(self, size: int) -> DeviceMemory:
        """One block for everything that runs, because one stream never runs two things at once."""
        if self._scratch is None or self._scratch.size < size:
            old, self._scratch = self._scratch, None
            if old is not None:
                self.device.synchronize()
                self._forget({old.address})
                old.free()
            self._scratch = self.device.allocate(max(ALIGNMENT, size))
        return self._scratch

    def close(self) -> None:
        """Frees everything; idempotent, after the engines were closed."""
        if not self.closed:
            self.closed = True
            with self.device.held():
                self.device.synchronize()
                self.tensors.close()
                self.landing.close()
                self.staging.free()
                if self._scratch is not None:
                    self._scratch.free()
                    self._scratch = None
                self.device.synchronize()  # when the driver gives freed memory back

    def _forget(self, addresses: set[int]) -> None:
        for holder in self.holders:
            holder(addresses)


class DeviceBuffer(Buffer):
    """A tensor on the device; its memory goes back to the arena with it.

    Most small inputs of a step are those of the step before, and are not sent again.
    """

    def __init__(self, arena: Arena, shape: tuple[int, ...], dtype: np.dtype[Any], *, zeroed: bool):
        self.shape, self.dtype, self._arena = shape, dtype, arena
        self.size = math.prod(shape) * dtype.itemsize
        self._sent: bytes | None = None  # what is there, if it is small and only the host writes it
        self._remembers = zeroed and self.size <= SMALL
        self._check_open()
        with arena.device.held():
            self.memory = arena.tensors.take(self.size)
            weakref.finalize(self, arena.tensors.give_back, self.memory).atexit = False
            if zeroed:
                arena.device.clear(self.memory)

    def write(self, values: Array) -> None:
        assert values.shape == self.shape, (values.shape, self.shape)
        assert values.dtype == self.dtype, (values.dtype, self.dtype)
        self._check_open()
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        sent = flat.tobytes() if self._remembers else None
        if sent is not None and sent == self._sent:
            return
        with self._arena.device.held():
            self._arena.staging.send(self.memory, flat)
        self._sent = sent

    def write_rows(self, start: int, values: Array) -> None:
        assert values.shape[1:] == self.shape[1:], (values.shape, self.shape)
        assert 0 <= start <= self.shape[0] - len(values), (start, values.shape, self.shape)
        assert values.dtype == self.dtype, (values.dtype, self.dtype)
        self._check_open()
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        with self._arena.device.held():
            offset = start * self.size // self.shape[0]
            self._arena.staging.send(self.memory, flat, offset)
        self._sent = None

    def becomes_output(self) -> None:
        """From now on the device writes it too."""
        self._remembers, self._sent = False, None

    def read(self) -> Array:
        return self.start_read()()

    def start_read(self) -> Callable[[], Array]:
        self._check_open()
        device, landing = self._arena.device, self._arena.landing
        with device.held():
            host = landing.take(self.size)
            device.download(host, self.memory, self.size)
            event = device.record()

        def finish() -> Array:
            event.wait()  # not held: other threads may queue work meanwhile
            return host.take(0, self.size).view(self.dtype).reshape(self.shape)

        weakref.finalize(finish, landing.give_back, host).atexit = False
        return finish

    def _check_open(self) -> None:
        if self._arena.closed:
            raise BackendError("GPU memory: used after the backend was closed; load again")


def device_buffers(component: Component, buffers: Mapping[str, Buffer]) -> dict[str, DeviceBuffer]:
    """Inputs, then outputs, of a call that is bound; they must be all, and share no memory."""
    names = [spec.name for spec in (*component.inputs, *component.outputs)]
    assert set(buffers) == set(names), sorted({*names} ^ set(buffers))
    bound = {name: b for name, b in buffers.items() if isinstance(b, DeviceBuffer)}
    assert len(bound) == len(buffers), "a buffer of another backend"
    read = {bound[spec.name].memory.address for spec in component.inputs}
    written = [bound[spec.name].memory.address for spec in component.outputs]
    assert not read & set(written), "an output buffer is also an input"
    assert len(set(written)) == len(written), "an output buffer is bound twice"
    for spec in component.outputs:
        bound[spec.name].becomes_output()
    return {name: bound[name] for name in names}
