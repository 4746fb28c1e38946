"""The GPU backends without a GPU: a simulated device below them, and real bundles above."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


def _load(name: str) -> ModuleType:
    file = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"gentron_tests_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def simulated() -> SimpleNamespace:
    """The modules of this folder that stand for something, as one."""
    names: dict = {}
    for module in ("watched_cuda", "host_core", "simulated_ort", "simulated_trt", "simulated_gpu"):
        names |= vars(_load(module))
    return SimpleNamespace(**names)


@pytest.fixture
def make_gpu(simulated, monkeypatch) -> Callable:
    """`make_gpu("simulated")`, or "host": CUDA's file on a stand-in for cuda.core, or "cuda"."""

    def make(kind: str):
        if kind == "simulated":
            return simulated.SimulatedGpu()
        if kind == "host":
            monkeypatch.setattr("gentron.engines.device_cuda.driver_missing", lambda: "")
            monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(core=simulated.HostCore()))
            return simulated.HostWatchedCuda()
        return simulated.WatchedCuda()

    return make


@pytest.fixture
def gpu(simulated):
    device = simulated.SimulatedGpu()
    yield device
    assert device.faults == []


@pytest.fixture
def backend_on(simulated, tmp_path: Path) -> Iterator[Callable]:
    """`backend_on(gpu)` is a TensorRtBackend on the simulated device; whatever is left of it when
    the test ends is a failure."""
    from gentron.engines.cache import EngineCache
    from gentron.engines.options import EngineOptions
    from gentron.engines.trt_run import TensorRtBackend

    made = []

    def make(gpu, name: str = "tensorrt", *, compiler=None, version: str = "11.0.0"):
        trt = simulated.SimulatedTensorRt(
            gpu, simulated.require, rtx=name == "tensorrt-rtx", version=version
        )
        backend = TensorRtBackend(
            name,
            EngineOptions(store=EngineCache(tmp_path / "engines")),
            device=lambda: gpu,
            trt=trt,
            compiler=compiler or simulated.SimulatedCompiler(name, version),
        )
        made.append((backend, gpu))
        return backend

    yield make
    for backend, gpu in made:
        backend.close()
        assert gpu.leaks() == []
