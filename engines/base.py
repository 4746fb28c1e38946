"""What every backend provides. Shaped for devices with their own memory, streams and profiles.

A component is compiled once into an `Engine`. Its caller owns `Buffer`s, which live where the
engine computes and may be read by several engines of one backend (the conditioning tables are
written by one component and read by another); it binds them once into a `Call` and then runs that
as often as it likes: the hot loop moves no tables and makes no allocation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.contract import PRECISIONS, Component, check_feeds
from gentron.engines.shapes import Profile
from gentron.errors import BackendError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Graph:
    """One component's ONNX file, and what must be known to compile it and to find it again."""

    component: Component
    file: Path
    precision: str  # fp32, fp16, bf16: of the graph's own tensors
    side_factor: int  # pixels per latent
    digest: str  # sha256 of the graph and of the weights beside it
    probes: Path | None = None  # golden probes that a fresh engine must pass
    profiles: tuple[Profile, ...] = ()  # sizes to compile for; empty: any
    flexible: bool = True  # the profiles are defaults: one compiled for others will do

    @property
    def compute(self) -> str:
        """numpy's name of the graph's own type."""
        return PRECISIONS[self.precision]


class Buffer(ABC):
    """Memory of one tensor where the engine computes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def write(self, values: Array) -> None:
        """Copies `values`, of this buffer's shape and type, from the host."""

    @abstractmethod
    def write_rows(self, start: int, values: Array) -> None:
        """Copies `values` [K, ...] over the rows `start` to `start + K` of the first axis."""

    @abstractmethod
    def read(self) -> Array:
        """A copy on the host, once everything that was queued before has finished."""

    def start_read(self) -> Callable[[], Array]:
        """Queues the copy; the result waits for what was queued before it, and for nothing that is
        queued afterwards. Where `Call.run` queues nothing, the copy is made at once."""
        values = self.read()
        return lambda: values


class Call(ABC):
    """An engine with all its inputs and outputs bound."""

    @abstractmethod
    def run(self) -> None:
        """Queues one execution; results are there after a `read` of an output."""


@dataclass(frozen=True)
class EngineInfo:
    """What really computes, as measured after loading rather than as asked for."""

    component: str
    backend: str
    device: str
    precision: str  # float32, float16, bfloat16
    version: str


class Engine(ABC):
    """One compiled component. `run` may be called from several threads."""

    component: Component
    compute: str  # numpy name of the graph's own type
    info: EngineInfo

    @abstractmethod
    def buffer(self, name: str, shape: tuple[int, ...]) -> Buffer:
        """New memory for the contract's tensor `name`; that of an input is zeroed."""

    @abstractmethod
    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        """Binds every input and output; an output buffer must not also be an input."""

    @abstractmethod
    def close(self) -> None:
        """Frees the engine; idempotent."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One plain execution from and to host arrays, for the components outside the loop."""
        sizes = check_feeds(self.component, feeds, self.compute)
        sizes |= self.output_sizes(sizes)
        buffers: dict[str, Buffer] = {}
        for name, values in feeds.items():
            buffers[name] = self.buffer(name, values.shape)
            buffers[name].write(values)
        for spec in self.component.outputs:
            shape = tuple(sizes[a] if isinstance(a, str) else a for a in spec.axes)
            buffers[spec.name] = self.buffer(spec.name, shape)
        self.bind(buffers).run()
        return {spec.name: buffers[spec.name].read() for spec in self.component.outputs}

    def output_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Axes that only outputs have: picture sides are latent sides times a constant."""
        return {axis: sizes[axis.lower()] * self.side_factor for axis in "HW" if "h" in sizes}

    side_factor: int = 1

    @property
    def largest(self) -> Mapping[str, int]:
        """The most that an axis may have, of those axes that are limited."""
        return {}


class Backend(ABC):
    """A way to run graphs on this machine."""

    name: str
    exact_shapes = False  # compiles for each shape in use: few shapes, met again, cost least
    precisions: tuple[str, ...]  # that it can compute in, the default first
    on_request: tuple[str, ...] = ()  # others, which nothing but a user's word chooses
    compile_factor = 1.0  # memory that compiling takes over that of float32 weights
    streams = False  # `load_streamed` works, and engines are in the machine's own memory

    def graph_precision(self, precision: str) -> str:
        """Which of a bundle's graphs it reads to compute in `precision`; raises BackendError for
        one that it cannot compute in."""
        if precision not in (*self.precisions, *self.on_request):
            raise BackendError(
                f"{self.name}: does not compute in {precision} on this machine; use "
                f"{' or '.join(self.precisions)}"
            )
        return precision

    @abstractmethod
    def describe(self) -> str:
        """Version and device, for people."""

    @abstractmethod
    def load(self, graph: Graph, precision: str) -> Engine:
        """Compiles or loads one graph; raises BackendError that says what is missing."""

    def load_streamed(self, graph: Graph) -> Engine:
        """An engine that keeps no weights: every call reads them from their mapped files. For a
        component that is larger than memory and runs once for a picture. Raises BackendError."""
        raise BackendError(
            f"{self.name}: cannot compute {graph.component.name} from its files alone; use another "
            "--backend, or a machine with more memory"
        )

    @abstractmethod
    def close(self) -> None:
        """Frees what engines share; idempotent, after all engines are closed."""

    def __enter__(self) -> Backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
