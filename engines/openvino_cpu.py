"""OpenVINO on the CPU: a compiled model for each shape in use, imported from the engine cache."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

from gentron.engines.base import Backend, Engine, Graph
from gentron.engines.compiler import Facts, Job
from gentron.engines.openvino_compiler import BLOB, PEAK, OpenVinoCompiler
from gentron.engines.openvino_engine import (
    NAME,
    Model,
    OpenVinoCpu,
    OpenVinoEngine,
    fixed_axes,
    fixed_shape,
)
from gentron.engines.options import EngineOptions
from gentron.engines.store import StaleEngineError, UnusableStoreError
from gentron.errors import BackendError

log = logging.getLogger(__name__)

# Of one component. Each holds its own copy of the weights; who alternates between more shapes than
# are kept waits each time for an import.
MODELS_KEPT = 4
BYTES_KEPT = 1 << 30  # more models than that, as long as their weights take no more


class ModelShelf:
    """The compiled models of one graph: obtained when a shape is first seen, and the few that were
    used last are kept."""

    def __init__(
        self, graph: Graph, precision: str, compiler: OpenVinoCompiler, options: EngineOptions
    ):
        self._graph, self._precision = graph, precision
        self._compiler, self._store = compiler, options.store
        self._report = options.reporting(graph.component.name)
        self._lock = threading.Lock()  # so that two threads do not make the same model
        self._kept: dict[tuple[int, ...], Model] = {}  # by sizes, the one used last at the end
        self._closed = False

    def model(self, sizes: Mapping[str, int]) -> Model:
        """Raises BackendError where there is none and none can be made, and after close()."""
        shape = fixed_shape(self._graph.component, sizes)
        key = tuple(size.usual for size in shape.values())
        with self._lock:
            if self._closed:
                raise BackendError(f"{self._graph.component.name}: used after close()")
            model = self._kept.pop(key, None)
            if model is None:
                model = self._make(self._compiler.job(self._graph, self._precision, shape))
            self._kept[key] = model
            while len(self._kept) > MODELS_KEPT and len(self._kept) * self._weights > BYTES_KEPT:
                del self._kept[next(iter(self._kept))]
        return model

    @functools.cached_property
    def _weights(self) -> int:
        """Bytes of one model's; looked at when there are many."""
        return self._compiler.device.weights(self._graph)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._kept.clear()

    def _make(self, job: Job) -> Model:
        if job.graph.digest:
            try:
                return self._obtain(job)
            except UnusableStoreError as error:
                _warn_once(f"{error}; until then every start compiles anew")
        model = self._compiler.compiled(job, job.profiles[0])
        self._compiler.prove(job, model)
        return model

    def _obtain(self, job: Job) -> Model:
        device, proven = self._compiler.device, list[Model]()

        def prove(folder: Path) -> Facts:
            proven.append(device.load(folder / BLOB, job.precision))
            return self._compiler.prove(job, proven[-1])

        entry = self._store.obtain(job, self._compiler, self._report, prove)
        if not entry.fresh:
            try:
                return device.load(entry.file(BLOB), job.precision)
            except StaleEngineError as error:
                self._store.reject(entry, str(error))
            entry = self._store.obtain(job, self._compiler, self._report, prove)
        # A fresh one was imported for its proof.
        return proven[-1] if proven else device.load(entry.file(BLOB), job.precision)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


class OpenVinoBackend(Backend):
    """Reads a bundle's float32 graphs, whatever it computes in."""

    name = NAME
    exact_shapes = True
    streams = True
    compile_factor = PEAK

    def __init__(self, options: EngineOptions | None = None):
        self._options = options or EngineOptions()
        self._device = OpenVinoCpu(self._options.threads)
        self._compiler = OpenVinoCompiler(self._options, self._device)
        self.precisions = self._device.precisions
        self.on_request = self._compiler.on_request

    def graph_precision(self, precision: str) -> str:
        super().graph_precision(precision)
        return "fp32"

    def describe(self) -> str:
        return f"openvino {self._device.version}, CPU {self._device.name}"

    def load(self, graph: Graph, precision: str) -> Engine:
        """Obtains at once what will be used in any case: models of the shapes that were declared,
        and the only one of a component that has no other axes than tables."""
        assert graph.precision == self.graph_precision(precision)
        shelf = ModelShelf(graph, precision, self._compiler, self._options)
        for profile in () if graph.flexible else graph.profiles:
            shelf.model({axis: sizes.usual for axis, sizes in profile.items()})
        if not fixed_axes(graph.component):
            shelf.model({})
        computed = self._compiler.job(graph, precision, {}).precision
        return OpenVinoEngine(graph, computed, self._device.version, shelf.model, shelf.close)

    def load_streamed(self, graph: Graph) -> Engine:
        """ONNX Runtime's: OpenVINO widens all weights of a graph when it compiles it."""
        from gentron.engines.onnxruntime_cpu import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, self._options.threads, streamed=True)

    def close(self) -> None:
        pass
