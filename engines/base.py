"""What every backend provides. Shaped for devices with their own memory, streams and profiles.

A component is compiled once into an `Engine`. Its caller owns `Buffer`s, which live where the
engine computes and may be read by several engines of one backend (the conditioning tables are
written by one component and read by another); it binds them once into a `Call` and then runs that
as often as it likes: the hot loop moves no tables and makes no allocation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.contract import Component, check_feeds

Array = npt.NDArray[Any]


class Buffer(ABC):
    """Memory of one tensor where the engine computes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def write(self, values: Array) -> None:
        """Copies `values`, of this buffer's shape and type, from the host."""

    @abstractmethod
    def read(self) -> Array:
        """A copy on the host, once everything that was queued before has finished."""


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
        """New zeroed memory for the contract's tensor `name`."""

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


class Backend(ABC):
    """A way to run graphs on this machine."""

    name: str

    @abstractmethod
    def compute(self) -> str:
        """The precision a component is loaded in unless told otherwise: a bundle's fp16, fp32."""

    @abstractmethod
    def load(self, component: Component, graph: Path, precision: str, side_factor: int) -> Engine:
        """Compiles or loads one graph; raises BackendError that says what is missing."""

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
