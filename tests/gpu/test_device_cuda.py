"""The file that touches CUDA: its errors and names here, the rest on a GPU."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gentron.engines import backend_named, backend_reports
from gentron.engines.device_buffers import Arena, DeviceBuffer
from gentron.engines.device_cuda import (
    CudaDevice,
    CudaHostMemory,
    CudaMemory,
    driver_missing,
    reported,
)
from gentron.engines.trt_flavor import FLAVORS
from gentron.engines.trt_run import missing
from gentron.errors import BackendError, RequestError, ResourceError

without_driver = pytest.mark.skipif(not driver_missing(), reason="this machine has a driver")
with_driver = pytest.mark.skipif(bool(driver_missing()), reason="no NVIDIA driver here")


@without_driver
def test_no_driver_is_one_line_that_says_so():
    with pytest.raises(BackendError, match=r"^no NVIDIA driver \(libcuda.so.1 is not there\)"):
        CudaDevice()


@without_driver
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_doctor_says_what_each_backend_lacks(name):
    (report,) = [r for r in backend_reports() if r.name == name]
    assert not report.usable
    assert "no NVIDIA driver" in report.detail
    assert "\n" not in report.detail
    with pytest.raises(BackendError, match=f"^{name}: .*no NVIDIA driver"):
        backend_named(name)


def test_everything_that_is_missing_is_said_at_once(monkeypatch):
    found = []
    monkeypatch.setattr("importlib.util.find_spec", found.append)
    monkeypatch.setattr("gentron.engines.trt_run.driver_missing", lambda: "no NVIDIA driver")
    said = missing(FLAVORS["tensorrt"])
    assert said == (
        "TensorRT is not installed (pip install 'gentron[tensorrt]'); "
        "cuda.core is not installed (pip install 'gentron[tensorrt]'); no NVIDIA driver"
    )
    assert found == ["tensorrt", "tensorrt_bindings", "cuda.core"]


@without_driver
def test_looking_for_a_backend_imports_nothing_large(monkeypatch):
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings", "cuda.core"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(BackendError):
        backend_named("tensorrt-rtx")
    assert not {"tensorrt_rtx", "tensorrt_rtx_bindings", "cuda.core"} & set(sys.modules)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out\nof memory"), ResourceError, "no memory left"),
        (RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS:\n bad"), BackendError, "ILLEGAL_ADDRESS: bad"),
        (RequestError("size", "is odd"), RequestError, "size: is odd"),
    ],
)
def test_what_cuda_reports_becomes_one_line(error, kind, words):
    with pytest.raises(kind, match=words) as caught, reported("copying"):
        raise error
    assert "\n" not in str(caught.value)


def test_host_memory_is_seen_through_its_address():
    raw = ctypes.create_string_buffer(256)
    memory = CudaHostMemory(SimpleNamespace(handle=ctypes.addressof(raw)), 256)
    memory.put(3, np.arange(5, dtype=np.uint8))
    assert raw.raw[3:8] == bytes(range(5))
    taken = memory.take(4, 2)
    memory.put(4, np.zeros(2, np.uint8))
    assert taken.tolist() == [1, 2]  # a copy


def test_memory_that_is_not_aligned_is_not_accepted():
    with pytest.raises(AssertionError):
        CudaMemory(SimpleNamespace(handle=0x7F0000000010), 256, None)


def test_cuda_core_has_every_name_that_is_used():
    core = pytest.importorskip("cuda.core")
    graph = pytest.importorskip("cuda.core.graph")
    used = {
        core.Device: "allocate compute_capability create_stream name set_current",
        core.Stream: "close create_graph_builder handle record sync",
        core.Event: "sync",
        core.Buffer: "close copy_to fill from_handle handle",
        core.LegacyPinnedMemoryResource: "allocate",
        graph.GraphBuilder: "begin_building complete end_building",
        graph.Graph: "close launch upload",
    }
    lacking = [f"{kind.__name__}.{name}" for kind, names in used.items()
               for name in names.split() if not hasattr(kind, name)]  # fmt: skip
    assert not lacking
    assert core.StreamOptions(nonblocking=True).nonblocking


@pytest.fixture(
    params=["host", pytest.param("cuda", marks=[pytest.mark.cuda, with_driver])],
)
def device(request, monkeypatch, simulated):
    if request.param == "host":
        monkeypatch.setattr("gentron.engines.device_cuda.driver_missing", lambda: "")
        monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(core=simulated.HostCore()))
    found = CudaDevice()
    yield found
    found.close()


def test_bytes_go_to_the_gpu_and_come_back(device):
    with device.held():
        memory, host = device.allocate(1 << 20), device.allocate_host(1 << 20)
        values = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
        host.put(0, values)
        device.upload(memory, 0, host, 0, values.size)
        device.record().wait()
        host.put(0, np.zeros_like(values))
        device.download(host, memory, values.size)
        device.record().wait()
        assert (host.take(0, values.size) == values).all()
        device.clear(memory)
        device.upload(memory, 512, host, 256, 256)
        device.download(host, memory, 1024)
        device.synchronize()
        assert (host.take(512, 256) == values[256:512]).all()
        assert not host.take(0, 512).any()
        memory.free()
        host.free()


def test_captured_work_runs_when_it_is_launched_and_not_before(device):
    with device.held():
        memory, host = device.allocate(256), device.allocate_host(256)
        host.put(0, np.ones(256, np.uint8))
        device.upload(memory, 0, host, 0, 256)
        work = device.capture(lambda: device.clear(memory))
        device.download(host, memory, 256)
        device.synchronize()
        assert host.take(0, 256).all()
        work.launch()
        device.download(host, memory, 256)
        device.synchronize()
        assert not host.take(0, 256).any()
        work.free()
        memory.free()
        host.free()


def test_more_memory_than_there_is_is_a_resource_error(device):
    with device.held(), pytest.raises(ResourceError, match="no memory left"):
        device.allocate(1 << 50)


def test_an_error_during_a_capture_ends_the_capture(device):
    def fail():
        raise BackendError("denoiser: executing failed")

    with device.held():
        memory = device.allocate(256)
        with pytest.raises(BackendError, match="denoiser: executing failed"):
            device.capture(fail)
        device.clear(memory)
        device.synchronize()
        memory.free()


def test_tensors_and_staging_work_on_it(device):
    arena = Arena(device)
    values = np.random.default_rng(1).normal(size=(3, 700_000)).astype(np.float32)  # > 8 segments
    buffer = DeviceBuffer(arena, values.shape, values.dtype, zeroed=True)
    assert not buffer.read().any()
    buffer.write(values)
    later = buffer.start_read()
    buffer.write(values * 0)
    np.testing.assert_array_equal(later(), values)
    assert not buffer.read().any()
    arena.close()


def test_an_absent_cuda_core_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gentron.engines.device_cuda.driver_missing", lambda: "")
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(BackendError, match="pip install 'cuda-core"):
        CudaDevice()
