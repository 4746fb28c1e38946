"""A module that stands for `tensorrt` or `tensorrt_rtx`, with the same names, on a SimulatedGpu.

As theirs, its calls return None or False where they fail and say why to the logger. Behind
`execute_async_v3` ONNX Runtime computes the graph that the plan names, when the stream gets there.
"""

from __future__ import annotations

import enum
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from gentron.engines.compiler import Compiler
from gentron.engines.shapes import tensor_shapes
from gentron.engines.trt_build import PLAN
from gentron.engines.trt_network import NAMES

DTYPES = {trt: np.dtype(name) for name, trt in NAMES.items() if name != "bfloat16"}
ALIGNMENT = 256
ERROR = 1

Enum = enum.IntEnum
TensorIOMode = Enum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
Allocation = Enum("Allocation", {"STATIC": 0, "ON_PROFILE_CHANGE": 1, "USER_MANAGED": 2})
Graphs = Enum("Graphs", {"DISABLED": 0, "WHOLE_GRAPH_CAPTURE": 1})
Specialization = Enum("Specialization", {"LAZY": 0, "EAGER": 1, "NONE": 2})
Diagnostics = Enum("Diagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})


class ILogger:
    def __init__(self) -> None:
        pass


class RuntimeCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.loaded = False

    def deserialize(self, blob: bytes) -> bool:
        try:
            self.kernels = set(json.loads(blob))
        except ValueError:
            return False
        self.loaded = True
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.kernels)).encode()


class RuntimeConfig:
    def __init__(self, rtx: bool):
        self.allocation = Allocation.STATIC
        self.cache: RuntimeCache | None = None
        if rtx:
            self.cuda_graph_strategy = Graphs.DISABLED
            self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    def __init__(self, module: Any, values: dict, runtime: Any):
        self.module, self.values = module, values
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._runtime = weakref.ref(runtime)
        runtime.engines.add(self)
        self.session = module.session(values["graph"]) if values["graph"] else None
        self.num_io_tensors = len(values["tensors"])
        self.num_optimization_profiles = len(values["profiles"])

    def __del__(self) -> None:
        if len(self.contexts):
            self.module.gpu.faults.append("an engine is freed before its contexts")
        if self._runtime() is None:
            self.module.gpu.faults.append("a runtime is freed before its engine")

    def get_tensor_name(self, index: int) -> str:
        return list(self.values["tensors"])[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode[self.values["tensors"][name]["mode"]]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.values["tensors"][name]["dtype"])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.values["profiles"][profile][name]]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.module.rtx)

    def create_engine_inspector(self) -> Any:
        """One layer, in the graph's own type unless `module.kernel_type` says otherwise."""
        self.module.gpu.check_held()
        self.module.inspected += 1
        kind = {"float16": "Half", "float32": "Float"}[self.values["compute"]]
        output = {"Name": "y", "Format/Datatype": self.module.kernel_type or kind}
        layer = {"Name": "_gemm_mha_v2_1", "LayerType": "kgen", "Outputs": [output]}
        text = json.dumps({"Layers": [layer]}) if self.module.inspects else "nothing known"
        return SimpleNamespace(get_engine_information=lambda form: text)

    def create_execution_context(self, *, runtime_config: RuntimeConfig) -> Context:
        context = Context(self, runtime_config)
        self.contexts.add(context)
        self.module.created += 1
        return context


class Context:
    def __init__(self, engine: Engine, config: RuntimeConfig):
        self.module, self.gpu, self.config = engine.module, engine.module.gpu, config
        self._engine = weakref.ref(engine)
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.changes = 0  # each makes what was captured from it undefined
        self.ran_with: dict | None = None  # shapes of the last plain run
        self.last = 0  # position in the stream of its last work
        self.recorded: tuple | None = None  # what TensorRT-RTX captured

    def __del__(self) -> None:
        if self.gpu.executed < self.last:
            self.gpu.faults.append("a context is freed while its work is queued")

    @property
    def engine(self) -> Engine:
        engine = self._engine()
        assert engine is not None
        return engine

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.gpu.check_held()
        self.changes += 1
        self.profile = profile
        return stream == self.gpu.stream and profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.gpu.check_held()
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if any(not a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            self.module.say(f"{name}: {shape} does not satisfy the profile {least} to {most}")
            return False
        self.changes += 1
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [n for n in self.engine.values["tensors"] if self._is_input(n)
                and n not in self.shapes]  # fmt: skip

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self._is_input(name):
            return self.shapes[name]
        sizes = self.engine.values["side_factor"]
        axes: dict[str, int] = {}
        for given, shape in self.shapes.items():
            axes |= dict(zip(self.engine.values["tensors"][given]["axes"], shape, strict=True))
        axes |= {a.upper(): axes[a] * sizes for a in "hw" if a in axes}
        return tuple(a if isinstance(a, int) else axes[a]
                     for a in self.engine.values["tensors"][name]["axes"])  # fmt: skip

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.gpu.check_held()
        self.changes += 1
        if address % ALIGNMENT:
            self.module.say(f"{name}: {address:#x} is not aligned")
            return False
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 4096 + 64 * sum(int(np.prod(shape)) for shape in self.shapes.values())

    def set_device_memory(self, address: int, size: int) -> None:
        self.gpu.check_held()
        self.changes += 1
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        gpu, fault = self.gpu, self.module.require
        gpu.check_held()
        fault(stream == gpu.stream, "executed on another stream")
        fault(self.config.allocation == Allocation.USER_MANAGED, "scratch of its own")
        needed = self.update_device_memory_size_for_shapes()
        fault(self.scratch[1] >= needed, f"scratch of {self.scratch[1]} bytes, {needed} are needed")
        tensors = self.engine.values["tensors"]
        missing = [name for name in tensors if name not in self.addresses]
        fault(not missing, f"no address for {missing}")
        ranges = {name: self._range(name) for name in tensors}
        ranges["scratch"] = (self.scratch[0], self.scratch[0] + needed)
        for name, (start, stop) in ranges.items():
            gpu.check_live(start, stop - start)
            if name != "scratch" and self._is_input(name):
                continue
            for other, (first, last) in ranges.items():
                fault(other == name or stop <= first or last <= start,
                      f"{name} and {other} share memory")  # fmt: skip
        captured = gpu.capturing is not None
        if captured:
            fault(self.ran_with == self.shapes, "captured before a plain run with these shapes")
        self.ran_with = dict(self.shapes)
        if self.module.rtx:
            fault(not captured, "TensorRT-RTX captures by itself")
            self._record((dict(self.shapes), dict(self.addresses), self.scratch))
        if self.config.cache is not None:
            self.config.cache.kernels.add(json.dumps(sorted(self.shapes.items())))
        self._enqueue(ranges, self.changes if captured else None)
        self.last = gpu.queued
        return True

    def _record(self, now: tuple) -> None:
        if self.config.cuda_graph_strategy == Graphs.WHOLE_GRAPH_CAPTURE and self.recorded != now:
            self.recorded = now
            self.gpu.counts["recaptures"] += 1

    def _enqueue(self, ranges: dict[str, tuple[int, int]], changes: int | None) -> None:
        gpu, module, session = self.gpu, self.module, self.engine.session
        tensors, context = self.engine.values["tensors"], weakref.ref(self)
        shapes = {name: self.get_tensor_shape(name) for name in tensors}
        inputs = [name for name in tensors if self._is_input(name)]
        outputs = [name for name in tensors if name not in inputs]

        def network(read: list[np.ndarray]) -> list[np.ndarray]:
            now = context()
            module.require(now is not None, "a context is freed while its work is queued")
            if changes is not None:
                module.require(now.changes == changes, "launched after its context was changed")
            feeds = {
                name: raw.view(DTYPES[tensors[name]["dtype"]]).reshape(shapes[name])
                for name, raw in zip(inputs, read, strict=True)
            }
            written = session.run(outputs, feeds)
            for name, values in zip(outputs, written, strict=True):
                module.require(values.shape == shapes[name], f"{name} has shape {values.shape}")
            gpu.counts["executions"] += 1
            return [np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in written]

        gpu.compute(
            network, [ranges[n] for n in inputs], [ranges[n] for n in outputs], ranges["scratch"]
        )

    def _range(self, name: str) -> tuple[int, int]:
        dtype = DTYPES[self.engine.values["tensors"][name]["dtype"]]
        size = int(np.prod(self.get_tensor_shape(name))) * dtype.itemsize
        return self.addresses[name], self.addresses[name] + size

    def _is_input(self, name: str) -> bool:
        return self.engine.values["tensors"][name]["mode"] == "INPUT"


class SimulatedTensorRt(SimpleNamespace):
    """The module; `rtx` adds what only TensorRT-RTX has."""

    def __init__(self, gpu: Any, require: Any, *, rtx: bool = False, version: str = "11.0.0"):
        super().__init__(
            __version__=version,
            ILogger=ILogger,
            TensorIOMode=TensorIOMode,
            ExecutionContextAllocationStrategy=Allocation,
            Refitter=Refitter,
            OnnxParserRefitter=OnnxParserRefitter,
        )
        self.gpu, self.require, self.rtx, self.created = gpu, require, rtx, 0
        self.LayerInformationFormat = SimpleNamespace(JSON=1)
        self.inspected, self.kernel_type, self.inspects = 0, "", True
        self._sessions: dict[str, Any] = {}
        self._logger: Any = None
        if rtx:
            self.CudaGraphStrategy = Graphs
            self.DynamicShapesKernelSpecializationStrategy = Specialization
            self.EngineInvalidityDiagnostics = Diagnostics

    def Runtime(self, logger: Any) -> Any:
        self._logger = logger
        return Runtime(self)

    def say(self, text: str) -> None:
        self._logger.log(ERROR, text)

    def session(self, graph: str) -> Any:
        if graph not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self._sessions[graph] = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[graph]


class Refitter:
    """Gives a stripped engine its weights."""

    def __init__(self, engine: Engine, logger: Any):
        self.engine, self.graph = engine, ""

    def refit_cuda_engine(self) -> bool:
        if not self.graph:
            self.engine.module.say("weights are missing")
            return False
        self.engine.session = self.engine.module.session(self.graph)
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any):
        self.refitter = refitter

    def refit_from_file(self, file: str) -> bool:
        if not Path(file).is_file():
            self.refitter.engine.module.say(f"cannot open {file}")
            return False
        self.refitter.graph = file
        return True


class Runtime:
    def __init__(self, module: SimulatedTensorRt):
        self.module = module
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        if module.rtx:
            self.get_engine_validity = lambda header: (2, int(Diagnostics.VERSION_MISMATCH))

    def __del__(self) -> None:
        if len(self.engines):
            self.module.gpu.faults.append("a runtime is freed before its engine")

    def deserialize_cuda_engine(self, plan: memoryview) -> Engine | None:
        self.module.gpu.check_held()
        try:
            values = json.loads(bytes(plan))
        except ValueError:
            self.module.say("Serialization assertion failed")
            return None
        if values["version"] != self.module.__version__:
            self.module.say(f"Version tag does not match: {values['version']}")
            return None
        return Engine(self.module, values, self)


class SimulatedCompiler(Compiler):
    """Writes plans that name their graph."""

    precisions = ("fp16", "fp32")

    def __init__(self, backend: str = "tensorrt", version: str = "11.0.0", strip: bool = False):
        self.backend, self.version, self.strip, self.compiled = backend, version, strip, []

    def identity(self, job):
        return {"recipe": "simulated", "written by": self.backend, "stripped": self.strip}

    def refusal(self, identity, targets):
        return ""

    def check(self, job):
        pass

    def compile(self, job, folder, report):
        self.compiled.append(job.graph.component.name)
        component = job.graph.component
        tensors = {}
        for mode, specs in (("INPUT", component.inputs), ("OUTPUT", component.outputs)):
            for spec in specs:
                dtype = job.graph.compute if spec.dtype == "compute" else spec.dtype
                tensors[spec.name] = {"mode": mode, "dtype": NAMES[dtype], "axes": spec.axes}
        values = {
            "version": self.version,
            "compute": job.graph.compute,
            "graph": "" if self.strip else str(job.graph.file.resolve()),
            "tensors": tensors,
            "profiles": [tensor_shapes(component, profile) for profile in job.profiles],
            "side_factor": job.graph.side_factor,
        }
        (folder / PLAN).write_text(json.dumps(values))
        return {}
