"""A stand-in for cuda.core, so that what uses it runs where there is no driver."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace


class HostCore:
    """cuda.core with the signatures of its stubs, on the host's memory; everything runs at once."""

    LARGEST = 1 << 30

    def __init__(self):
        self.recording = None
        core = self

        class Buffer:
            def __init__(self, ptr, size, owner):
                self.handle, self.size, self.owner = ptr, size, owner

            @staticmethod
            def from_handle(ptr, size, mr=None, owner=None, *, stream=None):
                return Buffer(ptr, size, owner)

            def copy_to(self, dst=None, *, stream, options=None):
                assert dst.size == self.size
                stream.do(lambda: ctypes.memmove(dst.handle, self.handle, self.size))
                return dst

            def fill(self, value, *, stream):
                stream.do(lambda: ctypes.memset(self.handle, value, self.size))

            def close(self, stream=None):
                self.owner = None

        class Stream:
            handle = 0x77

            def do(self, work):
                work() if core.recording is None else core.recording.append(work)

            def record(self, event=None, options=None):
                return SimpleNamespace(sync=lambda: None)

            def sync(self):
                assert core.recording is None

            def create_graph_builder(self):
                return GraphBuilder()

            def close(self):
                pass

        class GraphBuilder:
            def begin_building(self, mode="relaxed"):
                assert mode == "thread_local"
                core.recording = []

            def end_building(self):
                self.works, core.recording = core.recording, None
                return self

            def complete(self, options=None):
                return Graph(self.works)

        class Graph:
            def __init__(self, works):
                self.works = works

            def upload(self, stream):
                pass

            def launch(self, stream):
                for work in self.works:
                    stream.do(work)

            def close(self):
                self.works = []

        class Device:
            name, compute_capability = "Host", (8, 9)

            def __init__(self, index):
                assert index == 0

            def set_current(self, ctx=None):
                pass

            def create_stream(self, obj=None, options=None):
                assert options.nonblocking
                return Stream()

            def allocate(self, size, *, stream):
                if size > core.LARGEST:
                    raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
                raw = ctypes.create_string_buffer(size + 256)
                start = ctypes.addressof(raw)
                return Buffer(start + -start % 256, size, raw)

        class LegacyPinnedMemoryResource:
            def allocate(self, size, *, stream=None):
                return Device(0).allocate(size, stream=stream)

        self.Buffer, self.Device = Buffer, Device
        self.LegacyPinnedMemoryResource = LegacyPinnedMemoryResource
        self.StreamOptions = lambda nonblocking, priority=None: SimpleNamespace(
            nonblocking=nonblocking
        )
