"""A module that stands for `onnxruntime` with a provider of a GPU, on a SimulatedGpu.

Sessions take their inputs from the addresses that were bound, when the stream gets there; ONNX
Runtime's own session on the CPU computes.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

UNSYNCHRONISED = "disable_synchronize_execution_providers"


class SessionOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.devices: tuple | None = None

    def add_session_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value

    def add_provider_for_devices(self, devices: list, options: dict[str, str]) -> None:
        self.devices = devices, options


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value


class IOBinding:
    def __init__(self, gpu: Any):
        self.gpu = gpu
        self.ranges: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, tuple[np.dtype, list[int]]] = {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.tensors[name] = np.dtype(element_type), shape
        size = int(np.prod(shape)) * np.dtype(element_type).itemsize
        self.ranges[name] = buffer_ptr, buffer_ptr + size

    def bind_output(
        self, name, device_type="cpu", device_id=0, element_type=None, shape=None, buffer_ptr=None
    ):
        self.bind_input(name, device_type, device_id, element_type, shape, buffer_ptr)


class Session:
    def __init__(self, module: SimulatedOnnxRuntime, file: str, name: str, options: dict[str, str]):
        self.module, self.name, self.options = module, name, options
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        self.real = onnxruntime.InferenceSession(file, quiet, providers=["CPUExecutionProvider"])

    def get_inputs(self) -> list:
        return self.real.get_inputs()

    def get_providers(self) -> list[str]:
        return [*([self.name] if self.module.loads else []), "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list:
        nodes = [SimpleNamespace(get_nodes=lambda: ["MatMul"] * self.module.nodes)]
        nodes[0].ep_name = self.name
        return [*nodes, SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: ["Add"])]

    def io_binding(self) -> IOBinding:
        return IOBinding(self.module.gpu)

    def run_with_iobinding(self, iobinding: IOBinding, run_options: RunOptions) -> None:
        gpu, require = self.module.gpu, self.module.require
        gpu.check_held()
        require(run_options.entries.get(UNSYNCHRONISED) == "1", "a run waits for its end")
        inputs = [value.name for value in self.real.get_inputs()]
        outputs = [value.name for value in self.real.get_outputs()]
        require({*inputs, *outputs} == set(iobinding.ranges), "bound tensors are not the graph's")
        for start, stop in iobinding.ranges.values():
            gpu.check_live(start, stop - start)

        def network(read: list[np.ndarray]) -> list[np.ndarray]:
            feeds = {}
            for name, raw in zip(inputs, read, strict=True):
                dtype, shape = iobinding.tensors[name]
                feeds[name] = raw.view(dtype).reshape(shape)
            written = self.real.run(outputs, feeds)
            for name, values in zip(outputs, written, strict=True):
                require(list(values.shape) == iobinding.tensors[name][1], f"shape of {name}")
            return [np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in written]

        ranges = iobinding.ranges
        gpu.compute(network, [ranges[n] for n in inputs], [ranges[n] for n in outputs], None)


class SimulatedOnnxRuntime:
    """The module. `loads`: whether providers can be loaded; `nodes`: how many they take."""

    __version__ = "1.31.1"
    SessionOptions, RunOptions = SessionOptions, RunOptions

    def __init__(self, gpu: Any, require: Any, *, loads: bool = True, nodes: int = 5):
        self.gpu, self.require, self.loads, self.nodes = gpu, require, loads, nodes
        self.sessions: list[Session] = []

    def InferenceSession(self, file, sess_options, providers=None, enable_fallback=1):
        assert enable_fallback == 0, "a provider that fails is replaced"
        if providers is None:
            _, options = sess_options.devices
            name = "NvTensorRTRTXExecutionProvider"
        else:
            name, options = providers[0]
        stream = options["user_compute_stream"]
        self.require(stream == str(self.gpu.stream), "computes on a stream of its own")
        folder = options.get("trt_engine_cache_path") or options.get("nv_runtime_cache_path")
        if folder:
            (Path(folder) / "engine.bin").write_bytes(b"compiled")
        self.sessions.append(Session(self, file, name, options))
        return self.sessions[-1]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        assert name == "NvTensorRTRTXExecutionProvider"

    def get_ep_devices(self) -> list:
        return [SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider")]
