"""ONNX Runtime on the CPU: buffers are numpy arrays that the session reads and writes in place."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gentron.contract import Component
from gentron.engines.base import Array, Backend, Buffer, Call, Engine, EngineInfo, Graph
from gentron.engines.options import EngineOptions
from gentron.errors import BackendError, BundleError

CPU = "CPUExecutionProvider"
OPTIMISED = "engine.onnx"


def import_onnxruntime() -> Any:
    # Since 1.29 its Linux wheels record every session and send it to Microsoft unless told not to,
    # which only this variable does, and only before the import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"backend onnxruntime: cannot be imported ({error}); run: pip install 'gentron[cpu]'"
        ) from error
    return onnxruntime


class HostBuffer(Buffer):
    """An aligned array that ONNX Runtime sees without copying."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]):
        self.shape, self.dtype = shape, dtype
        self.array = np.zeros(shape, dtype)
        self.value = import_onnxruntime().OrtValue.ortvalue_from_numpy(self.array)
        # Without shared memory a write after binding would never be seen.
        assert self.value.data_ptr() == self.array.ctypes.data

    def write(self, values: Array) -> None:
        assert values.shape == self.shape, (values.shape, self.shape)
        assert values.dtype == self.dtype, (values.dtype, self.dtype)
        np.copyto(self.array, values)

    def write_rows(self, start: int, values: Array) -> None:
        rows = self.array[start : start + len(values)]
        assert values.shape == rows.shape, (values.shape, start, self.shape)
        assert values.dtype == self.dtype, (values.dtype, self.dtype)
        np.copyto(rows, values)

    def read(self) -> Array:
        return self.array.copy()


def check_inputs(component: Component, found: list[str], file: Path) -> None:
    """Raises BundleError for a graph that is another component's, or of another version."""
    wanted = [spec.name for spec in component.inputs]
    if found != wanted:
        raise BundleError(
            f"{file}: not a graph of {component.name}: its inputs are {', '.join(found)}, not "
            f"{', '.join(wanted)}; export the bundle again"
        )


class HostCall(Call):
    """Bindings made once; they hold their buffers, so no pointer outlives its memory."""

    def __init__(self, session: Any, buffers: Mapping[str, HostBuffer], component: Component):
        self._session, self._buffers = session, dict(buffers)
        self._binding = session.io_binding()
        for spec in component.inputs:
            self._binding.bind_ortvalue_input(spec.name, buffers[spec.name].value)
        for spec in component.outputs:
            self._binding.bind_ortvalue_output(spec.name, buffers[spec.name].value)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


class OnnxRuntimeEngine(Engine):
    def __init__(
        self, graph: Graph, threads: int, optimised: Path | None = None, *, streamed: bool = False
    ):
        """`optimised` is what `OnnxRuntimeCompiler` made of the graph, if it did. `streamed` keeps
        no weights: every call widens them from the mapped files, and frees them as it goes on."""
        ort = import_onnxruntime()
        component = graph.component
        self.component, self.compute = component, graph.compute
        self.side_factor = graph.side_factor
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if streamed:  # an arena and repacked weights would be further copies
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        if streamed or optimised is not None:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        file = optimised or graph.file
        try:
            self._session = ort.InferenceSession(str(file), options, providers=[CPU])
        except Exception as error:  # ONNX Runtime's own classes share no useful base
            raise BackendError(f"onnxruntime: {component.name} ({file}): {error}") from error
        if self._session.get_providers()[0] != CPU:
            raise BackendError(f"onnxruntime: asked for {CPU}, got {self._session.get_providers()}")
        found = [value.name for value in self._session.get_inputs()]
        check_inputs(component, found, file)
        self.info = EngineInfo(
            component.name, "onnxruntime", "cpu", self.compute, str(ort.__version__)
        )

    def buffer(self, name: str, shape: tuple[int, ...]) -> Buffer:
        return HostBuffer(shape, self.component.tensor(name).numpy_dtype(self.compute))

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        if self._session is None:
            raise BackendError(f"{self.component.name}: used after close()")
        wanted = {spec.name for spec in (*self.component.inputs, *self.component.outputs)}
        assert set(buffers) == wanted, sorted(wanted ^ set(buffers))
        host = {name: b for name, b in buffers.items() if isinstance(b, HostBuffer)}
        assert len(host) == len(buffers), "a buffer of another backend"
        inputs = {host[spec.name].value.data_ptr() for spec in self.component.inputs}
        outputs = {host[spec.name].value.data_ptr() for spec in self.component.outputs}
        assert not inputs & outputs, "an output buffer is also an input"
        return HostCall(self._session, host, self.component)

    def close(self) -> None:
        self._session = None


class OnnxRuntimeBackend(Backend):
    """CPU only here; a GPU provider is another backend, never a silent fallback of this one."""

    name = "onnxruntime"
    precisions = ("fp32", "fp16")
    streams = True

    def __init__(self, options: EngineOptions | None = None):
        import_onnxruntime()
        self._options = options or EngineOptions()
        self._lock = threading.Lock()

    def describe(self) -> str:
        return f"onnxruntime {import_onnxruntime().__version__}, CPU"

    def load(self, graph: Graph, precision: str) -> Engine:
        assert graph.precision == self.graph_precision(precision)
        from gentron.engines.onnxruntime_compiler import OnnxRuntimeCompiler

        compiler, store = OnnxRuntimeCompiler(self._options), self._options.store
        with self._lock:
            if graph.digest:
                (job,) = compiler.jobs(graph, precision)
                if entry := store.find(job, compiler):
                    try:
                        optimised = entry.file(OPTIMISED)
                        return OnnxRuntimeEngine(graph, self._options.threads, optimised)
                    except BackendError as error:
                        store.reject(entry, str(error))
            return OnnxRuntimeEngine(graph, self._options.threads)

    def load_streamed(self, graph: Graph) -> Engine:
        return OnnxRuntimeEngine(graph, self._options.threads, streamed=True)

    def close(self) -> None:
        pass
