"""ONNX Runtime on an NVIDIA GPU: sessions that read and write our memory, on our stream.

As with TensorRT, a run is queued and nobody waits for it: tensors are bound to device memory, the
provider computes on the device's stream, and ONNX Runtime is told not to synchronise. What it does
not do is capture: each step costs it one launch for every kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from gentron.contract import PRECISIONS
from gentron.engines.base import Backend, Buffer, Call, Engine, EngineInfo, Graph
from gentron.engines.device import Device
from gentron.engines.device_buffers import Arena, DeviceBuffer, device_buffers
from gentron.engines.device_cuda import CudaDevice
from gentron.engines.onnxruntime_cpu import check_inputs, import_onnxruntime
from gentron.engines.onnxruntime_kept import KeptFolder, kept_name
from gentron.engines.onnxruntime_providers import (
    CUDA,
    PROVIDERS,
    Provider,
    missing,
    one_line,
    rtx_devices,
    set_up,
)
from gentron.engines.options import EngineOptions
from gentron.engines.proof import prove_profiles
from gentron.engines.shapes import Profile
from gentron.engines.trt_profiles import choose
from gentron.errors import BackendError

# So that `run_with_iobinding` returns when everything is queued.
UNSYNCHRONISED = "disable_synchronize_execution_providers"
RECORD = "session.record_ep_graph_assignment_info"  # which provider computes what; since 1.24


class ProviderCall(Call):
    """Bound once to addresses; keeps what lies there."""

    def __init__(self, engine: ProviderEngine, binding: Any, buffers: Mapping[str, Buffer]):
        self._engine, self._binding, self._buffers = engine, binding, dict(buffers)

    def run(self) -> None:
        self._engine.execute(self._binding)


class ProviderEngine(Engine):
    def __init__(
        self, graph: Graph, provider: Provider, session: Any, ort: Any, arena: Arena,
        info: EngineInfo, index: int, kept: KeptFolder | None,
    ):  # fmt: skip
        self.component, self.compute = graph.component, graph.compute
        self.side_factor, self.info = graph.side_factor, info
        self.profiles: tuple[Profile, ...] = graph.profiles if provider.compiles else ()
        self._provider, self._session, self._index = provider, session, index
        self._kept = kept
        self._arena, self._device = arena, arena.device
        self._outputs = {spec.name for spec in graph.component.outputs}
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(UNSYNCHRONISED, "1")

    def buffer(self, name: str, shape: tuple[int, ...]) -> Buffer:
        dtype = self.component.tensor(name).numpy_dtype(self.compute)
        return DeviceBuffer(self._arena, shape, dtype, zeroed=name not in self._outputs)

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        session, memory = self._check_open(), self._provider.memory
        bound = device_buffers(self.component, buffers)
        if self.profiles:
            sizes = self.component.bind(
                {s.name: bound[s.name].shape for s in self.component.inputs}
            )
            choose(self.component, self.profiles, sizes, self.side_factor)
        binding = session.io_binding()
        for name, buffer in bound.items():
            bind = binding.bind_output if name in self._outputs else binding.bind_input
            bind(name, memory, self._index, buffer.dtype.type, list(buffer.shape),
                 buffer.memory.address)  # fmt: skip
        return ProviderCall(self, binding, bound)

    def execute(self, binding: Any) -> None:
        with self._device.held():
            try:
                self._check_open().run_with_iobinding(binding, self._options)
            except BackendError:
                raise
            except Exception as error:  # ONNX Runtime's own classes share no useful base
                raise BackendError(
                    f"{self._provider.backend}: {self.component.name}: executing failed: "
                    f"{one_line(error)}"
                ) from error

    def close(self) -> None:
        with self._device.held():
            if self._session is not None:
                self._device.synchronize()
                self._session = None
                if self._kept and self._kept.sealed:  # a provider may write when it ends
                    self._kept.seal()

    def _check_open(self) -> Any:
        if self._session is None:
            raise BackendError(f"{self.component.name}: used after close()")
        return self._session


class ProviderBackend(Backend):
    """One GPU, one stream, one arena for tensors; each session has scratch of its own."""

    precisions = ("fp16", "fp32")

    def __init__(
        self,
        name: str,
        options: EngineOptions | None = None,
        *,
        device: Callable[[], Device] | None = None,
        ort: Any = None,
        provider: Provider | None = None,
    ):
        """The keywords put something else in the place of CUDA, ONNX Runtime and its provider."""
        self._provider, self._closed = provider or PROVIDERS[name], False
        self.name, self._options = name, options or EngineOptions()
        self._index = self._options.device or 0
        if device is None and (absent := missing(self._provider)):
            raise BackendError(f"{name}: {absent}")
        self._ort = ort or import_onnxruntime()
        set_up(self._provider, self._ort)
        try:
            self._device = device() if device else CudaDevice(self._index)
        except BackendError as error:
            raise BackendError(f"{name}: {error}") from error
        self._arena = Arena(self._device)
        self._version = str(self._ort.__version__)

    def describe(self) -> str:
        generation = "sm{}{}".format(*self._device.capability)
        return f"{self._provider.title} {self._version}, {self._device.name} ({generation})"

    def load(self, graph: Graph, precision: str) -> Engine:
        assert graph.precision == self.graph_precision(precision)
        if self._closed:
            raise BackendError(f"{self.name}: used after close(); load again")
        if not self._provider.compiles:
            return self._open(graph, precision, None)
        kept = KeptFolder(kept_name(graph, precision, self.describe()))
        proved = kept.open()
        self._options.reporting(graph.component.name)("compiling", 0.0)
        engine = self._open(graph, precision, kept)
        try:
            if not proved:
                prove_profiles(engine, graph, precision, engine.profiles)
            kept.seal()
        except BaseException:
            engine.close()
            raise
        return engine

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._arena.close()
            self._device.close()

    def _open(self, graph: Graph, precision: str, kept: KeptFolder | None) -> ProviderEngine:
        component = graph.component
        with self._device.held():
            session = self._session(graph, str(kept.path) if kept else "")
        found = [value.name for value in session.get_inputs()]
        check_inputs(component, found, graph.file)
        info = EngineInfo(
            component.name, self.name, self._device.name, PRECISIONS[precision], self._version
        )
        return ProviderEngine(
            graph, self._provider, session, self._ort, self._arena, info, self._index, kept
        )

    def _session(self, graph: Graph, folder: str) -> Any:
        """Computes with the provider that was asked for; raises BackendError for any other."""
        ort, provider, component = self._ort, self._provider, graph.component
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.use_deterministic_compute = True
        options.add_session_config_entry(RECORD, "1")
        wanted = self._provider_options(provider, graph, folder)
        try:
            if provider.library:
                providers = [(provider.name, wanted)]
                if provider.name == PROVIDERS["onnxruntime-tensorrt"].name:  # what it cannot do
                    cuda = self._provider_options(PROVIDERS["onnxruntime-cuda"], graph, "")
                    providers.append((CUDA, cuda))
                session = ort.InferenceSession(
                    str(graph.file), options, providers=providers, enable_fallback=0
                )
            else:
                devices = rtx_devices(ort)
                if self._index >= len(devices):
                    raise BackendError(
                        f"{self.name}: {provider.title} sees {len(devices)} GPUs that it runs on, "
                        f"and number {self._index} is asked for; use --backend onnxruntime-cuda"
                    )
                options.add_provider_for_devices([devices[self._index]], wanted)
                session = ort.InferenceSession(str(graph.file), options, enable_fallback=0)
        except BackendError:
            raise
        except Exception as error:  # ONNX Runtime's own classes share no useful base
            raise BackendError(
                f"{self.name}: {component.name} ({graph.file}): {one_line(error)}"
            ) from error
        self._check_provider(session, component.name)
        return session

    def _provider_options(self, provider: Provider, graph: Graph, folder: str) -> dict[str, str]:
        return provider.options(
            self._index, self._device.stream, graph.component, graph.profiles, folder
        )

    def _check_provider(self, session: Any, component: str) -> None:
        """ONNX Runtime says nothing when it computes elsewhere."""
        wanted, found = self._provider.name, session.get_providers()
        if not found or found[0] != wanted:
            why = missing(self._provider) or "ONNX Runtime does not say why"
            raise BackendError(
                f"{self.name}: asked for {wanted}, got {', '.join(found)} for {component}: {why}"
            )
        if hasattr(session, "get_provider_graph_assignment_info"):
            nodes: Counter[str] = Counter()
            for part in session.get_provider_graph_assignment_info():
                nodes[part.ep_name] += len(part.get_nodes())
            if not nodes[wanted]:
                elsewhere = ", ".join(f"{n} by {name}" for name, n in nodes.items())
                raise BackendError(
                    f"{self.name}: {wanted} computes nothing of {component} ({elsewhere}); use "
                    "another --backend"
                )
