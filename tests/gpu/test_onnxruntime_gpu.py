"""ONNX Runtime's providers for GPUs: bound to our memory, on our stream, and never another one.

The real ONNX Runtime runs on the CPU through the same code, with CUDA's file on a stand-in for
cuda.core; a stand-in for its GPU providers runs on the simulated GPU. `-m cuda` in
`test_on_a_gpu.py` is the real one.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from gentron.bundle import Bundle
from gentron.engines import EngineOptions, backend_named, backend_reports, bundle_graph
from gentron.engines.device_cuda import driver_missing
from gentron.engines.onnxruntime_gpu import ProviderBackend
from gentron.engines.onnxruntime_kept import KeptFolder
from gentron.engines.onnxruntime_providers import PROVIDERS, TF32, Provider, missing
from gentron.errors import BackendError, RequestError
from gentron.probe import load_probes, probe_inputs
from gentron.runtime import Pipeline

REQUEST = {"seed": 7, "steps": 6, "solver": "ddim", "guidance": 4.0}
NAMES = list(PROVIDERS)
without_driver = pytest.mark.skipif(not driver_missing(), reason="this machine has a driver")


@dataclass(frozen=True)
class OnHost(Provider):
    """The CPU's provider, as if it were a GPU's."""

    def options(self, index, stream, component, profiles, folder):
        return {}


ON_HOST = OnHost(
    backend="onnxruntime-cuda", title="ONNX Runtime", name="CPUExecutionProvider", library="none",
    install="", compiles=False, memory="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """TF32's variable is restored, and folders are kept for one test."""
    monkeypatch.setenv(TF32, "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def rtx_package(monkeypatch):
    package = SimpleNamespace(get_library_path=lambda: "plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", package)


@pytest.fixture
def provider_on(simulated, rtx_package) -> Callable:
    """`provider_on(gpu, name)` is that backend on a simulated GPU, which it leaves empty."""
    made = []

    def make(gpu, name: str = "onnxruntime-cuda", **simulation):
        ort = simulated.SimulatedOnnxRuntime(gpu, simulated.require, **simulation)
        made.append((ProviderBackend(name, device=lambda: gpu, ort=ort), gpu))
        return made[-1][0]

    yield make
    for backend, gpu in made:
        backend.close()
        assert gpu.leaks() == []


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def expected(request, bundle):
    with Pipeline(bundle, backend_named("onnxruntime"), request.param, request.param) as pipeline:
        yield request.param, pipeline("a cat", batch=2, **REQUEST)


def test_the_real_onnxruntime_on_bound_addresses_gives_the_same_bits(expected, bundle, make_gpu):
    precision, wanted = expected
    gpu = make_gpu("host")
    backend = ProviderBackend("onnxruntime-cuda", device=lambda: gpu, provider=ON_HOST)
    with Pipeline(bundle, backend, precision, precision) as pipeline:
        for _ in range(2):
            found = pipeline("a cat", batch=2, **REQUEST)
            np.testing.assert_array_equal(found.latents, wanted.latents)
            np.testing.assert_array_equal(found.images, wanted.images)
    assert {c.backend for c in found.components} == {"onnxruntime-cuda"}
    assert gpu.leaks() == []


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_those_of_the_cpu_to_the_bit(expected, bundle, gpu, provider_on, name):
    precision, wanted = expected
    with Pipeline(bundle, provider_on(gpu, name), precision, precision) as pipeline:
        found = pipeline("a cat", batch=2, **REQUEST)
    np.testing.assert_array_equal(found.latents, wanted.latents)
    np.testing.assert_array_equal(found.images, wanted.images)


def test_a_step_is_queued_while_the_last_one_is_waited_for(bundle, gpu, provider_on):
    with Pipeline(bundle, provider_on(gpu), "fp32", "fp32") as pipeline:
        pipeline("a cat", **REQUEST)
        before = None
        for step in pipeline.stream("a cat", **REQUEST):
            assert gpu.pending.count("execute") == (1 if step.index < step.total - 1 else 0)
            if before is not None and step.index < step.total - 1:
                made = gpu.counts - before
                assert 0 < made["bytes_up"] < 500
                assert made["waits"] == made["bytes_down"] == 1
                assert made["synchronize"] == made["allocations"] == 0
            before = gpu.counts.copy()


@pytest.mark.parametrize("name", NAMES)
def test_a_provider_that_did_not_load_is_an_error_that_says_why(
    bundle, gpu, provider_on, name, monkeypatch
):
    why = "libcublasLt.so.13: cannot open shared object file"
    monkeypatch.setattr("gentron.engines.onnxruntime_gpu.missing", lambda provider: why)
    backend = provider_on(gpu, name, loads=False)
    with pytest.raises(BackendError, match=f"{name}: asked for .*got CPUEx.*libcublasLt") as caught:
        backend.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    assert "\n" not in str(caught.value)


def test_a_provider_that_computes_nothing_is_an_error(bundle, gpu, provider_on):
    with pytest.raises(BackendError, match=r"computes nothing of denoiser .*1 by CPUExecution"):
        provider_on(gpu, nodes=0).load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")


def test_the_real_session_says_which_provider_computes(bundle, make_gpu):
    gpu = make_gpu("host")
    with ProviderBackend("onnxruntime-cuda", device=lambda: gpu, provider=ON_HOST) as backend:
        engine = backend.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
        nodes = sum(
            len(part.get_nodes())
            for part in engine._session.get_provider_graph_assignment_info()
            if part.ep_name == "CPUExecutionProvider"
        )
        assert nodes > 50
        engine.close()


@without_driver
@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_one_line_and_nothing_large_is_loaded(name, monkeypatch):
    def refuse(file, **_):
        raise AssertionError(f"{file} is loaded without a driver")

    monkeypatch.setattr("gentron.engines.onnxruntime_providers._cannot_load", refuse)
    (report,) = [r for r in backend_reports() if r.name == name]
    assert not report.usable
    assert report.detail.startswith(f"{name}: no NVIDIA driver (libcuda.so.1 is not there)")
    assert "\n" not in report.detail


def test_a_library_that_a_provider_lacks_is_named(monkeypatch, tmp_path):
    """As the dynamic linker says it. With onnxruntime-gpu 1.31.1 and no CUDA it said just this."""
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / PROVIDERS["onnxruntime-cuda"].library).touch()
    monkeypatch.setattr("gentron.engines.onnxruntime_providers.driver_missing", lambda: "")
    monkeypatch.setattr("gentron.engines.onnxruntime_providers.is_installed", lambda name: True)
    monkeypatch.setattr("gentron.engines.onnxruntime_providers._folder", lambda name: tmp_path)

    def load(file, mode=0):
        if "cuda" in file:
            raise OSError("libcublasLt.so.13: cannot open shared object file: No such file")

    monkeypatch.setattr("ctypes.CDLL", load)
    said = missing(PROVIDERS["onnxruntime-cuda"])
    assert said.startswith(
        "libonnxruntime_providers_cuda.so cannot be loaded: libcublasLt.so.13: cannot open shared"
    )
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in said
    said = missing(PROVIDERS["onnxruntime-tensorrt"])
    assert said.startswith("the onnxruntime that is installed has no TensorrtExecutionProvider")


def test_options_keep_float32_and_use_our_stream(bundle, gpu, provider_on):
    graph = bundle_graph(bundle, "denoiser", "fp16")
    backend = provider_on(gpu)
    backend.load(graph, "fp16").close()
    (session,) = backend._ort.sessions
    assert session.options["use_tf32"] == "0"
    assert session.options["user_compute_stream"] == str(gpu.stream)
    for name, prefix in (("onnxruntime-tensorrt", "trt"), ("onnxruntime-rtx", "nv")):
        options = PROVIDERS[name].options(0, 81, graph.component, graph.profiles, "folder")
        shapes = options[f"{prefix}_profile_opt_shapes"].split(",")
        assert "state:1x3x1x4x8x8" in shapes
        assert len(shapes) == len(graph.component.inputs)
        assert not any("fp16" in option or "graph" in option for option in options)


def test_tf32_that_was_asked_for_is_refused_where_only_a_variable_can_turn_it_off(
    gpu, provider_on, monkeypatch
):
    monkeypatch.setenv(TF32, "1")
    with pytest.raises(BackendError, match=f"{TF32}=1 .*; set {TF32}=0"):
        provider_on(gpu, "onnxruntime-tensorrt")
    monkeypatch.delenv(TF32)
    provider_on(gpu, "onnxruntime-tensorrt")
    assert os.environ[TF32] == "0"


def test_what_was_compiled_is_proved_once_and_dropped_if_it_was_altered(
    bundle, gpu, provider_on, monkeypatch, caplog
):
    proved = []
    monkeypatch.setattr(
        "gentron.engines.onnxruntime_gpu.prove_profiles",
        lambda engine, *_: proved.append(engine.component.name),
    )
    backend = provider_on(gpu, "onnxruntime-tensorrt")
    graph = bundle_graph(bundle, "denoiser", "fp16")
    for _ in range(2):
        backend.load(graph, "fp16").close()
    assert proved == ["denoiser"]
    kept = Path(backend._ort.sessions[0].options["trt_engine_cache_path"])
    (kept / "engine.bin").write_bytes(b"something else")
    backend.load(graph, "fp16").close()
    assert proved == ["denoiser"] * 2
    assert "engine.bin was edited or damaged; dropped" in caplog.text
    (kept / "more.bin").touch()
    backend.load(graph, "fp16").close()
    assert len(proved) == 3


def test_what_failed_its_proof_is_not_kept(bundle, gpu, provider_on, monkeypatch):
    def fail(*_):
        raise BackendError("denoiser is not what torch computes")

    monkeypatch.setattr("gentron.engines.onnxruntime_gpu.prove_profiles", fail)
    backend = provider_on(gpu, "onnxruntime-rtx")
    for _ in range(2):
        with pytest.raises(BackendError, match="not what torch computes"):
            backend.load(bundle_graph(bundle, "denoiser", "fp16"), "fp16")


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path):
    kept = KeptFolder("denoiser", tmp_path / "kept")
    assert not kept.open()
    (kept.path / "engine.bin").touch()
    kept.seal()
    assert kept.open()
    kept.path.chmod(0o777)
    with pytest.raises(BackendError, match="only you may write there"):
        kept.open()


def test_a_size_outside_what_was_compiled_names_the_axis(bundle, gpu, provider_on):
    engine = provider_on(gpu, "onnxruntime-tensorrt").load(
        bundle_graph(bundle, "vae_decoder", "fp32"), "fp32"
    )
    with pytest.raises(RequestError, match="a height of 32 pixels"):
        engine.run({"latents": np.zeros((1, 4, 16, 8), np.float32)})
    engine.close()


def test_closed_engines_and_backends_say_so(bundle, gpu, provider_on):
    backend = provider_on(gpu)
    graph = bundle_graph(bundle, "denoiser", "fp32")
    engine = backend.load(graph, "fp32")
    engine.close()
    engine.close()
    case, _ = load_probes(bundle.path / bundle.manifest.probes["denoiser"])[0]
    with pytest.raises(BackendError, match=r"denoiser: used after close\(\)"):
        engine.run(probe_inputs(engine.component, case))
    backend.close()
    with pytest.raises(BackendError, match=r"onnxruntime-cuda: used after close\(\)"):
        backend.load(graph, "fp32")


def test_the_second_gpu_of_one_is_an_error(bundle, gpu, simulated, rtx_package):
    ort = simulated.SimulatedOnnxRuntime(gpu, simulated.require)
    options = EngineOptions(device=1)
    backend = ProviderBackend("onnxruntime-rtx", options, device=lambda: gpu, ort=ort)
    said = "sees 1 GPUs that it runs on, and number 1 is"
    with backend, pytest.raises(BackendError, match=said):
        backend.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")


def test_the_stand_in_has_the_signatures_of_onnxruntime(simulated):
    for name in ("bind_input", "bind_output"):
        real = inspect.signature(getattr(onnxruntime.IOBinding, name))
        assert list(inspect.signature(getattr(simulated.IOBinding, name)).parameters) == list(
            real.parameters
        )
    real = inspect.signature(onnxruntime.InferenceSession.run_with_iobinding)
    assert list(real.parameters)[1:] == ["iobinding", "run_options"]
    for name in (
        "get_ep_devices", "register_execution_provider_library", "SessionOptions", "RunOptions",
    ):  # fmt: skip
        assert hasattr(onnxruntime, name)
    options = onnxruntime.SessionOptions()
    for name in ("add_session_config_entry", "add_provider_for_devices"):
        assert hasattr(options, name)
    options.use_deterministic_compute = True
    onnxruntime.RunOptions().add_run_config_entry(simulated.UNSYNCHRONISED, "1")
