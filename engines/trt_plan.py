"""One deserialised plan: checked against the contract, and the contexts that execute it.

Nothing in TensorRT raises: what returns None, False or a missing name becomes one BackendError
with what TensorRT said last. Everything here happens in the thread that holds the device.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentron.contract import COMPUTE, Component
from gentron.engines.compiler import Facts
from gentron.engines.device_buffers import Arena
from gentron.engines.store import StaleEngineError
from gentron.engines.trt_inspect import inspect_engine
from gentron.engines.trt_kernels import KernelFile
from gentron.engines.trt_log import Messages, failure, require
from gentron.engines.trt_network import NAMES
from gentron.engines.trt_profiles import read_profiles
from gentron.errors import BackendError

HEADER_BYTES = 64


@dataclass(frozen=True)
class TensorRt:
    """The module, its runtime and what it says; shared by all plans of a backend."""

    trt: Any
    runtime: Any
    messages: Messages
    version: str
    our_logger: Any  # whom TensorRT tells

    @property
    def finishes_kernels(self) -> bool:
        """Whether kernels are finished where they run, and whole graphs captured by TensorRT
        itself: TensorRT-RTX."""
        return hasattr(self.trt, "CudaGraphStrategy")


@dataclass(frozen=True)
class Binding:
    """Shapes and addresses of every tensor of one call."""

    profile: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of inputs, then outputs
    addresses: tuple[int, ...]


class Plan:
    """Contexts die before the engine, and the engine before the runtime: see `close`."""

    def __init__(
        self, tensorrt: TensorRt, file: Path, component: Component, compute: str,
        arena: Arena, kernels: KernelFile | None, weights: Path | None = None,
    ):  # fmt: skip
        """`weights` is the graph that a stripped plan was made of, beside its weights. Raises
        StaleEngineError for a file that this machine's TensorRT cannot load."""
        self._tensorrt, self._component, self._arena = tensorrt, component, arena
        self._engine: Any = _deserialise(tensorrt, file, component.name)
        if weights is not None:
            refit(tensorrt, self._engine, weights, component.name)
        _check_contract(self._engine, component, compute, file)
        self.profiles = read_profiles(self._engine, component)
        self._kernel_file = kernels if tensorrt.finishes_kernels else None
        self._kernels: Any = None  # IRuntimeCache, shared by the contexts
        if self._kernel_file:
            config = self.required(self._engine.create_runtime_config(), "configuring")
            self._kernels = self.required(config.create_runtime_cache(), "creating a cache")
            self._kernel_file.read_into(self._kernels)

    @property
    def captures_itself(self) -> bool:
        return self._tensorrt.finishes_kernels

    def context(self, profile: int, *, captured: bool) -> Context:
        """A new one. `captured`: its binding will not change, so TensorRT-RTX may capture it."""
        trt = self._tensorrt.trt
        config = self.required(self._engine.create_runtime_config(), "configuring")
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._kernels is not None:
            self.required(config.set_runtime_cache(self._kernels), "setting the kernels")
        if self._tensorrt.finishes_kernels:
            # Lazily, a faster kernel would replace another during a run, and change its last bits.
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            graphs = trt.CudaGraphStrategy
            config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if captured else graphs.DISABLED
        created = self._engine.create_execution_context(runtime_config=config)
        context = self.required(created, "creating an execution context")
        self.required(
            context.set_optimization_profile_async(profile, self._arena.device.stream),
            f"choosing profile {profile}",
        )
        return Context(self, context, config, self._arena)

    def inspect(self) -> Facts:
        """Of which kernels it consists; see `inspect_engine`."""
        running = self._tensorrt
        return inspect_engine(running.trt, self._engine, running.messages, self._component.name)

    def keep_kernels(self) -> None:
        """What was compiled so far; again and again, because a process may never end in order."""
        if self._kernel_file and self._kernels is not None:
            self._kernel_file.write_from(self._kernels)

    def close(self) -> None:
        """After its contexts; idempotent."""
        if self._engine is not None:
            self.keep_kernels()
            self._kernels = None
            self._engine = None

    def required(self, value: Any, what: str) -> Any:
        return require(value, what, self._tensorrt.messages, self._component.name)

    def failed(self, what: str) -> BackendError:
        return failure(self._tensorrt.messages, self._component.name, what)


def refit(tensorrt: TensorRt, engine: Any, graph: Path, component: str) -> None:
    """Gives a stripped engine the weights of its ONNX graph; raises BackendError."""
    trt, messages, logger = tensorrt.trt, tensorrt.messages, tensorrt.our_logger
    refitter = require(trt.Refitter(engine, logger), "starting to refit", messages, component)
    parser = require(trt.OnnxParserRefitter(refitter, logger), "refitting", messages, component)
    require(parser.refit_from_file(str(graph)), f"reading {graph.name}", messages, component)
    require(refitter.refit_cuda_engine(), "giving a plan its weights", messages, component)


class Context:
    """An IExecutionContext with shapes, addresses and scratch. Not to be changed once captured."""

    def __init__(self, plan: Plan, context: Any, config: Any, arena: Arena):
        self._plan, self._context, self._config, self._arena = plan, context, config, arena
        self._binding: Binding | None = None
        self._scratch = 0  # address

    def set_up(self, binding: Binding, outputs: Sequence[str]) -> None:
        """For the next `execute`; costs nothing if nothing changed."""
        required = self._plan.required
        if self._binding != binding:
            self._binding = None
            for name, shape in binding.shapes:
                if name not in outputs:
                    required(self._context.set_input_shape(name, shape), f"shape {shape} of {name}")
            missing = self._context.infer_shapes()
            if missing:
                raise self._plan.failed(f"inferring shapes without {', '.join(missing)}")
            for (name, shape), address in zip(binding.shapes, binding.addresses, strict=True):
                found = tuple(self._context.get_tensor_shape(name))
                if found != shape:
                    raise self._plan.failed(f"{name} has shape {found}, not {shape}: binding")
                required(self._context.set_tensor_address(name, address), f"address of {name}")
            self._needed = int(self._context.update_device_memory_size_for_shapes())
            self._scratch = 0
            self._binding = binding
        scratch = self._arena.scratch(self._needed)
        if scratch.address != self._scratch:
            self._context.set_device_memory(scratch.address, scratch.size)
            self._scratch = scratch.address

    def execute(self) -> None:
        """Queues one execution, or records it where the stream is being captured."""
        started = self._context.execute_async_v3(self._arena.device.stream)
        self._plan.required(started, "executing")

    def close(self) -> None:
        self._context = self._config = None


def _deserialise(tensorrt: TensorRt, file: Path, component: str) -> Any:
    """From a mapping, so that the weights are not held twice."""
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as plan,
    ):
        engine = tensorrt.runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            return engine
        with plan[:HEADER_BYTES] as header:
            why = _diagnosis(tensorrt, header)
    said = "; ".join(tensorrt.messages.last_errors()) or "no reason given"
    raise StaleEngineError(
        f"{component}: {file.parent.name}: TensorRT {tensorrt.version} cannot load this engine"
        f"{why}: {said}; remove its folder, or build it again with gentron-build"
    )


def _diagnosis(tensorrt: TensorRt, header: memoryview) -> str:
    """What TensorRT-RTX reads in the first bytes: version, GPU, driver."""
    if not hasattr(tensorrt.runtime, "get_engine_validity"):
        return ""
    found = int(tensorrt.runtime.get_engine_validity(header)[1])
    names: Mapping[str, Any] = tensorrt.trt.EngineInvalidityDiagnostics.__members__
    words = [name.lower().replace("_", " ") for name, bit in names.items() if int(bit) & found]
    return f" ({', '.join(words)})" if words else ""


def _check_contract(engine: Any, component: Component, compute: str, file: Path) -> None:
    """Names, directions and types, of the file that is really there."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {n: (engine.get_tensor_mode(n).name, engine.get_tensor_dtype(n).name) for n in names}
    wanted = {
        spec.name: (mode, NAMES[compute if spec.dtype == COMPUTE else spec.dtype])
        for mode, specs in (("INPUT", component.inputs), ("OUTPUT", component.outputs))
        for spec in specs
    }
    if found != wanted:
        different = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
        raise StaleEngineError(
            f"{component.name}: {file.parent.name}: tensors {', '.join(different)} are not the "
            "contract's; remove its folder, or build it again with gentron-build"
        )
