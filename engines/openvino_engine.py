"""OpenVINO on the CPU: the device, compiled models, and engines that run them on numpy's memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gentron.contract import PRECISIONS, Component
from gentron.engines.base import Array, Buffer, Call, Engine, EngineInfo, Graph
from gentron.engines.openvino_int8 import GROUP, round_weights
from gentron.engines.shapes import AxisRange, Profile
from gentron.engines.store import StaleEngineError
from gentron.errors import BackendError

NAME = "openvino"
INT8 = "int8"
HINT = "INFERENCE_PRECISION_HINT"
HINTS = {"fp32": "f32", "bf16": "bf16"}  # the option's name -> OpenVINO's
FREE_AXES = ("T", "U")  # table sizes: leaving these open costs no time, leaving all open 6 to 14 %


def import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"backend {NAME}: cannot be imported ({error}); run: pip install 'gentron[openvino]'"
        ) from error
    return openvino


def fixed_axes(component: Component) -> tuple[str, ...]:
    """Those that have one size in a compiled model."""
    axes = [a for spec in component.inputs for a in spec.axes if isinstance(a, str)]
    return tuple(axis for axis in dict.fromkeys(axes) if axis not in FREE_AXES)


def fixed_shape(component: Component, sizes: Mapping[str, int]) -> Profile:
    """What one compiled model is for."""
    return {axis: AxisRange.fixed(sizes[axis]) for axis in fixed_axes(component)}


@dataclass(frozen=True)
class Model:
    """Compiled for one shape. An imported one may go on reading the file that it came from."""

    compiled: Any
    file: Any = None  # its mapping, to be kept as long


@functools.cache
def openvino_core() -> Any:
    """One for the process, and never freed: OpenVINO 2026.4 installs a stack for signal handlers
    with each, and of two that are freed in the order they were made, the second puts back that of
    the first, which is gone. The next Ctrl-C would then crash the process."""
    return import_openvino().Core()


class OpenVinoCpu:
    """The device. Always says which precision it wants, and asks which one it got: unless told,
    OpenVINO computes float32 graphs in bfloat16 wherever the CPU can."""

    def __init__(self, threads: int = 0):
        """`threads` 0: all physical cores."""
        openvino = import_openvino()
        self.version, self.threads = str(openvino.__version__), threads
        self._openvino, self._core = openvino, openvino_core()
        self._int8: tuple[Path, Any] | None = None  # rounded last
        try:
            self.name = str(self._core.get_property("CPU", "FULL_DEVICE_NAME"))
            found = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        except RuntimeError as error:
            raise BackendError(
                f"backend {NAME}: no CPU device ({one_line(error)}); use --backend onnxruntime"
            ) from error
        self.capabilities = tuple(sorted(map(str, found)))
        self.precisions = ("fp32", "bf16") if "BF16" in self.capabilities else ("fp32",)

    def weights(self, graph: Graph) -> int:
        """Bytes of the graph's constants as float32; reads none of them."""
        return sum(
            4 * int(np.prod(node.get_output_shape(0), dtype=np.int64))
            for node in self._read(graph).get_ops()
            if node.get_type_name() == "Constant"
        )

    def compile(self, graph: Graph, shape: Profile, precision: str) -> Model:
        """Raises BackendError for a graph that is damaged or not the component's."""
        model = self._read(graph)
        wanted = {
            spec.name: [
                axis if isinstance(axis, int) else shape[axis].usual if axis in shape else -1
                for axis in spec.axes
            ]
            for spec in graph.component.inputs
        }
        try:
            if precision == INT8:
                model = self._rounded(graph, model)
            model.reshape({n: self._openvino.PartialShape(s) for n, s in wanted.items()})
            drop_lone_softmaxes(model)
            compiled = self._core.compile_model(model, "CPU", self._properties(precision))
        except RuntimeError as error:
            raise _cannot_compile(graph, one_line(error)) from error
        return Model(self._checked(compiled, precision))

    def load(self, blob: Path, precision: str) -> Model:
        """Imports what was exported from a compiled model; raises StaleEngineError."""
        # Copy-on-write, because OpenVINO takes no read-only array: nothing is read twice, and
        # pages that it has no use for need no memory.
        file = self._openvino.Tensor(np.memmap(blob, np.uint8, "c"), shared_memory=True)
        try:
            compiled = self._core.import_model(file, "CPU", self._properties(precision))
        except RuntimeError as error:
            raise StaleEngineError(
                f"{blob}: {NAME} {self.version} cannot load it ({one_line(error)}); remove its "
                "folder and run again"
            ) from error
        return Model(self._checked(compiled, precision), file)

    def _read(self, graph: Graph) -> Any:
        try:
            model = self._core.read_model(str(graph.file))
        except RuntimeError as error:
            raise _cannot_compile(graph, one_line(error)) from error
        found = {i.any_name: np.dtype(i.element_type.to_dtype()) for i in model.inputs}
        wanted = {s.name: s.numpy_dtype(graph.compute) for s in graph.component.inputs}
        if found != wanted:
            differing = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
            reason = f"its inputs {', '.join(differing)} are not those of the contract"
            raise _cannot_compile(graph, reason)
        return model

    def hint(self, precision: str) -> str:
        """OpenVINO's name for what is computed in; with weights of 8 bits the rest is as short as
        this CPU can."""
        return HINTS[self.precisions[-1] if precision == INT8 else precision]

    def _rounded(self, graph: Graph, model: Any) -> Any:
        """Rounding takes longer than compiling, and one graph is compiled for several shapes."""
        if self._int8 is None or self._int8[0] != graph.file:
            self._int8 = graph.file, round_weights(model)
        return self._int8[1].clone()

    def _properties(self, precision: str) -> dict[str, Any]:
        properties = {HINT: self.hint(precision), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        properties |= GROUP if precision == INT8 else {}
        return properties | ({"INFERENCE_NUM_THREADS": self.threads} if self.threads else {})

    def _checked(self, compiled: Any, precision: str) -> Any:
        used = compiled.get_property(HINT).to_string()
        if used != self.hint(precision):
            raise BackendError(
                f"{NAME}: asked to compute in {precision}, computes in {used}; use another "
                "--precision, or --backend onnxruntime"
            )
        return compiled


class OpenVinoBuffer(Buffer):
    """An array that OpenVINO reads and writes without copying."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]):
        self.shape, self.dtype = shape, dtype
        self.array = np.zeros(shape, dtype)
        self.tensor = import_openvino().Tensor(self.array, shared_memory=True)
        # Without shared memory a write after binding would never be seen.
        assert self.tensor.data.ctypes.data == self.array.ctypes.data

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


class OpenVinoCall(Call):
    """A request of its own, bound once. Holds its buffers and its model, so that neither goes
    while it may run."""

    def __init__(self, model: Model, buffers: Mapping[str, OpenVinoBuffer], component: Component):
        self._model, self._buffers = model, dict(buffers)
        self._request = model.compiled.create_infer_request()
        for spec in (*component.inputs, *component.outputs):
            self._request.set_tensor(spec.name, buffers[spec.name].tensor)

    def run(self) -> None:
        self._request.infer()


class OpenVinoEngine(Engine):
    """`model_for` gives the compiled model for the sizes of a call, until `close` was called."""

    def __init__(
        self,
        graph: Graph,
        precision: str,
        version: str,
        model_for: Callable[[Mapping[str, int]], Model],
        close: Callable[[], None],
    ):
        self.component, self.compute = graph.component, graph.compute
        self.side_factor = graph.side_factor
        self.info = EngineInfo(graph.component.name, NAME, "cpu", PRECISIONS[precision], version)
        self._model_for, self._close = model_for, close

    def buffer(self, name: str, shape: tuple[int, ...]) -> Buffer:
        return OpenVinoBuffer(shape, self.component.tensor(name).numpy_dtype(self.compute))

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        inputs, outputs = self.component.inputs, self.component.outputs
        wanted = {spec.name for spec in (*inputs, *outputs)}
        assert set(buffers) == wanted, sorted(wanted ^ set(buffers))
        host = {name: b for name, b in buffers.items() if isinstance(b, OpenVinoBuffer)}
        assert len(host) == len(buffers), "a buffer of another backend"
        read = {host[spec.name].array.ctypes.data for spec in inputs}
        written = {host[spec.name].array.ctypes.data for spec in outputs}
        assert not read & written, "an output buffer is also an input"
        sizes = self.component.bind({spec.name: host[spec.name].shape for spec in inputs})
        return OpenVinoCall(self._model_for(sizes), host, self.component)

    def close(self) -> None:
        self._close()


def drop_lone_softmaxes(model: Any) -> int:
    """A softmax over one element is 1: what attends to itself alone, such as the only frame of an
    image in temporal attention, needs no queries and keys. They go with it, where sizes are fixed.
    Returns how many there were."""
    constant, found = import_openvino().opset1.constant, 0
    for node in model.get_ops():
        if node.get_type_name() != "Softmax" or node.get_output_partial_shape(0).is_dynamic:
            continue
        shape = tuple(node.get_output_shape(0))
        if shape[node.get_attributes()["axis"]] == 1:
            ones = np.ones(shape, node.get_output_element_type(0).to_dtype())
            node.output(0).replace(constant(ones).output(0))
            found += 1
    return found


def one_line(error: Exception) -> str:
    """OpenVINO's messages without the places in its own source that lead them."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith("Exception from ")]
    return " ".join(kept or lines)


def _cannot_compile(graph: Graph, reason: str) -> BackendError:
    return BackendError(
        f"{NAME}: {graph.component.name} ({graph.file}): {reason}; copy or export the bundle "
        "again, or use --backend onnxruntime"
    )
