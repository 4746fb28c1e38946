"""OpenVINO on the CPU: the precision that was asked for, memory shared with numpy, any shape."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("openvino", reason="not installed; pip install '.[dev]'")

from gentron.bundle import Bundle
from gentron.engines import Backend, EngineOptions, backend_named, backend_reports, bundle_graph
from gentron.engines.cache import EngineCache
from gentron.engines.openvino_compiler import FileOnly
from gentron.engines.openvino_cpu import MODELS_KEPT, OpenVinoBackend
from gentron.engines.openvino_engine import HINT, OpenVinoCpu, drop_lone_softmaxes, openvino_core
from gentron.engines.probe_check import check_bundle
from gentron.engines.shapes import AxisRange
from gentron.errors import BackendError
from gentron.probe import ProbeCase, probe_inputs

SIZES = {"B": 2, "R": 5, "F": 1, "T": 4, "U": 2, "h": 6, "w": 4}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    """One for all of this file, so that each shape is compiled once."""
    return EngineCache(tmp_path_factory.mktemp("openvino") / "engines")


@pytest.fixture(scope="module")
def backend(cache: EngineCache) -> Iterator[Backend]:
    with backend_named("openvino", EngineOptions(store=cache)) as made:
        yield made


@pytest.fixture
def bf16(backend: Backend) -> str:
    if "bf16" not in backend.precisions:
        pytest.skip("this CPU has no bfloat16: computing in it was NOT tested")
    return "bf16"


@pytest.fixture
def denoiser(bundle, backend):
    engine = backend.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(bundle):
    """The same graph on ONNX Runtime, with all axes symbolic."""
    with backend_named("onnxruntime") as other:
        engine = other.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
        yield engine
        engine.close()


def feeds(component, seed=3, **sizes):
    return probe_inputs(component, ProbeCase(seed, SIZES | sizes))


def relative(a, b):
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())


def bound(engine, inputs):
    """Buffers for every tensor of the denoiser, filled with a probe's inputs."""
    buffers = {name: engine.buffer(name, values.shape) for name, values in inputs.items()}
    for name, values in inputs.items():
        buffers[name].write(values)
    buffers["next_state"] = engine.buffer("next_state", inputs["state"].shape)
    buffers["bad"] = engine.buffer("bad", inputs["state"].shape[:1])
    return buffers


# --- precision ---


def test_every_golden_probe_passes_in_every_precision_and_only_the_denoiser_is_rounded(
    bundle, backend
):
    checks = [c for c in check_bundle(bundle, backend) if c.result != "skipped"]
    assert {(c.component, c.precision) for c in checks} == {
        (name, precision) for name in bundle.components for precision in backend.precisions
    }
    for check in checks:
        assert check.result == "pass", check
        rounded = (check.component, check.precision) == ("denoiser", "bf16")
        assert check.computed == ("bfloat16" if rounded else "float32")
        worst = max(a.max_relative for a in check.agreements)
        # What is said to be float32 is float32, whatever was asked for; what is rounded, rounded.
        assert worst > 1e-4 if rounded else worst < 5e-5, check


def test_float16_graphs_are_skipped_aloud(bundle, backend):
    skipped = [c for c in check_bundle(bundle, backend, ["conditioner"]) if c.result == "skipped"]
    assert [(c.precision, c.skipped.partition(" does")[0]) for c in skipped] == [
        ("fp16", "openvino")
    ]


def test_a_device_that_computes_in_another_precision_than_it_was_told_is_refused(
    bundle, tmp_path, monkeypatch, bf16
):
    monkeypatch.setattr(OpenVinoCpu, "_properties", lambda device, precision: {HINT: "bf16"})
    options = EngineOptions(store=EngineCache(tmp_path / "engines"))
    with (
        backend_named("openvino", options) as other,
        pytest.raises(BackendError, match="asked to compute in fp32, computes in bf16"),
    ):
        other.load(bundle_graph(bundle, "conditioner", "fp32"), "fp32")
    assert options.store.entries() == []


def test_a_precision_that_does_not_run_here_is_refused(backend, monkeypatch):
    with pytest.raises(BackendError, match="does not compute in fp16 on this machine; use fp32"):
        backend.graph_precision("fp16")
    monkeypatch.setattr(backend, "precisions", ("fp32",))
    with pytest.raises(BackendError, match="bf16"):
        backend.graph_precision("bf16")


# --- shapes ---


def test_shapes_may_change_back_and_forth_without_end(bundle, denoiser, reference):
    shapes = [{"R": rows} for rows in range(1, MODELS_KEPT + 2)] + [{"B": 1}, {"h": 4, "w": 6}]
    first = {}
    for turn in range(2):
        for number, sizes in enumerate(shapes):
            inputs = feeds(denoiser.component, seed=number, **sizes)
            found = denoiser.run(inputs)["next_state"]
            assert relative(found, reference.run(inputs)["next_state"]) < 2e-5, sizes
            assert np.array_equal(found, first.setdefault(number, found)), (turn, sizes)


def test_few_models_are_in_memory_and_a_bound_call_outlives_its_own(denoiser, monkeypatch):
    monkeypatch.setattr("gentron.engines.openvino_cpu.BYTES_KEPT", 0)
    inputs = feeds(denoiser.component)
    buffers = bound(denoiser, inputs)
    call = denoiser.bind(buffers)
    call.run()
    before = buffers["next_state"].read()
    loads, load = [], OpenVinoCpu.load
    monkeypatch.setattr(OpenVinoCpu, "load", lambda *a: loads.append(1) or load(*a))
    for rows in range(1, MODELS_KEPT + 1):
        denoiser.run(feeds(denoiser.component, R=rows))
    assert len(loads) == MODELS_KEPT
    denoiser.run(feeds(denoiser.component, R=MODELS_KEPT))
    assert len(loads) == MODELS_KEPT
    buffers["next_state"].write(np.zeros_like(before))
    call.run()
    assert np.array_equal(buffers["next_state"].read(), before)
    denoiser.run(inputs)
    assert len(loads) == MODELS_KEPT + 1
    monkeypatch.setattr("gentron.engines.openvino_cpu.BYTES_KEPT", 1 << 30)  # of light ones more
    for rows in range(1, MODELS_KEPT + 3):
        denoiser.run(feeds(denoiser.component, R=rows))
    before_again = len(loads)
    denoiser.run(inputs)
    assert len(loads) == before_again


def test_tables_of_any_length_share_one_model(bundle, backend, denoiser, reference, cache):
    denoiser.run(feeds(denoiser.component))
    conditioner = backend.load(bundle_graph(bundle, "conditioner", "fp32"), "fp32")
    entries = len(cache.entries())
    for rows, texts in ((4, 2), (9, 1), (1, 7), (4, 2)):
        inputs = feeds(denoiser.component, T=rows, U=texts)
        found = denoiser.run(inputs)["next_state"]
        assert relative(found, reference.run(inputs)["next_state"]) < 2e-5
        timesteps = probe_inputs(conditioner.component, ProbeCase(1, {"T": rows}))
        assert len(conditioner.run(timesteps)["modulation"]) == rows
    assert len(cache.entries()) == entries
    conditioner.close()


def test_declared_shapes_are_there_when_loading_is_done(bundle, backend, monkeypatch):
    graph = bundle_graph(bundle, "denoiser", "fp32")
    sizes = {axis: AxisRange.fixed(SIZES[axis]) for axis in graph.profiles[0]}
    engine = backend.load(replace(graph, profiles=(sizes,), flexible=False), "fp32")
    for name in ("load", "compile"):
        monkeypatch.setattr(OpenVinoCpu, name, lambda *_: pytest.fail("too late"))
    assert engine.run(feeds(engine.component))["next_state"].shape[0] == SIZES["B"]
    engine.close()


# --- memory and threads ---


def test_a_write_after_binding_is_seen_and_no_run_changes_its_inputs(denoiser):
    inputs = feeds(denoiser.component)
    buffers = bound(denoiser, inputs)
    call = denoiser.bind(buffers)
    call.run()
    first = buffers["next_state"].read()
    buffers["state"].write(inputs["state"] * 2)
    call.run()
    assert not np.array_equal(first, buffers["next_state"].read())
    buffers["state"].write(inputs["state"])
    call.run()
    assert np.array_equal(first, buffers["next_state"].read())
    for name, values in inputs.items():
        assert np.array_equal(buffers[name].read(), values), name


def test_outputs_are_written_in_place(denoiser):
    buffers = bound(denoiser, feeds(denoiser.component))
    buffers["next_state"].array[:] = np.nan
    array = buffers["next_state"].array
    denoiser.bind(buffers).run()
    assert np.isfinite(array).all()


def test_an_output_that_is_also_an_input_is_refused(denoiser):
    buffers = bound(denoiser, feeds(denoiser.component))
    buffers["next_state"] = buffers["state"]
    with pytest.raises(AssertionError, match="also an input"):
        denoiser.bind(buffers)


def test_a_thousand_runs_and_rebindings_keep_memory_flat(denoiser):
    buffers = bound(denoiser, feeds(denoiser.component))
    process, sizes = psutil.Process(), []
    for index in range(1000):
        denoiser.bind(buffers).run()
        if index % 100 == 99:
            sizes.append(process.memory_info().rss / 2**20)
    assert sizes[-1] - sizes[3] < 2, sizes


def test_threads_get_what_serial_calls_get_and_compile_a_shape_once(bundle, tmp_path, monkeypatch):
    compiled, compile_model, ready = [], OpenVinoCpu.compile, threading.Barrier(4)
    monkeypatch.setattr(OpenVinoCpu, "compile", lambda *a: compiled.append(1) or compile_model(*a))
    options = EngineOptions(store=EngineCache(tmp_path / "engines"))
    with backend_named("openvino", options) as other, ThreadPoolExecutor(4) as pool:
        engine = other.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
        inputs = [feeds(engine.component, seed=seed) for seed in range(4)]

        def run(number):
            ready.wait()
            return [engine.run(inputs[number])["next_state"] for _ in range(10)]

        found = list(pool.map(run, range(4)))
        for number, states in enumerate(found):
            wanted = engine.run(inputs[number])["next_state"]
            assert all(np.array_equal(state, wanted) for state in states)
        engine.close()
    assert len(compiled) == 1


def test_a_closed_engine_refuses_to_bind(bundle, backend):
    engine = backend.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    buffers = bound(engine, feeds(engine.component))
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match=r"denoiser: used after close\(\)"):
        engine.bind(buffers)


# --- what cannot work ---


def why_refused(graph, tmp_path):
    """The only line of an error; and nothing was kept."""
    options = EngineOptions(store=EngineCache(tmp_path / "engines"))
    with backend_named("openvino", options) as other, pytest.raises(BackendError) as refused:
        other.load(graph, "fp32")
    assert options.store.entries() == []
    (line,) = str(refused.value).splitlines()
    assert line.endswith("; copy or export the bundle again, or use --backend onnxruntime")
    return line


@pytest.mark.parametrize("length", [0, 3000])
def test_a_damaged_graph_is_named_and_nothing_is_stored(bundle, tmp_path, length):
    wrong = tmp_path / "conditioner.fp32.onnx"
    wrong.write_bytes(bundle.graph("conditioner", "fp32").read_bytes()[:length])
    graph = replace(bundle_graph(bundle, "conditioner", "fp32"), file=wrong)
    assert why_refused(graph, tmp_path).startswith(f"openvino: conditioner ({wrong}): ")


@pytest.mark.parametrize(
    ("component", "other", "precision", "differing"),
    [
        ("conditioner", "text_projection", "fp32", "hidden_1, hidden_2, mask_1, mask_2, pooled"),
        ("denoiser", "denoiser", "fp16", "modulation, text_bias_1, text_bias_2, text_kv_1"),
    ],
    ids=["of another component", "of another type"],
)
def test_a_graph_with_other_inputs_is_refused_by_their_names(
    bundle, tmp_path, component, other, precision, differing
):
    graph = bundle_graph(bundle, component, "fp32")
    shape = {axis: AxisRange.fixed(SIZES[axis]) for axis in graph.profiles[0]}
    graph = replace(graph, file=bundle.graph(other, precision), profiles=(shape,), flexible=False)
    assert f"its inputs {differing}" in why_refused(graph, tmp_path)


def test_an_absent_package_is_reported_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install 'gentron\[openvino\]'"):
        OpenVinoBackend()
    (report,) = [r for r in backend_reports() if r.name == "openvino"]
    assert not report.usable
    assert "pip install" in report.detail


def test_doctor_names_version_and_processor():
    (report,) = [r for r in backend_reports() if r.name == "openvino"]
    assert report.usable
    assert report.detail.startswith("openvino 20")
    assert "CPU" in report.detail


def test_control_c_is_an_interrupt_also_after_devices_have_come_and_gone(bundle):
    """The process would crash if a device left its stack for signal handlers behind."""
    script = """
import gc, os, signal, sys, time
from gentron.bundle import Bundle
from gentron.engines import EngineOptions, backend_named, bundle_graph
from gentron.engines.cache import EngineCache
from pathlib import Path

graph = bundle_graph(Bundle.open(sys.argv[1]), "conditioner", "fp32")
options = EngineOptions(store=EngineCache(Path(sys.argv[2])))
backends = [backend_named("openvino", options) for _ in range(2)]
engines = [backend.load(graph, "fp32") for backend in backends]
while backends:  # in the order they were made
    engines.pop(0).close()
    backends.pop(0).close()
    gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
except KeyboardInterrupt:
    print("interrupted")
"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", script, str(bundle.path), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.parametrize(("frames", "gone"), [(1, True), (3, False)])
def test_an_image_in_a_video_model_needs_no_queries_and_keys_of_frames(
    tiny_video_bundle, backend, frames, gone
):
    bundle = Bundle.open(tiny_video_bundle)
    graph = bundle_graph(bundle, "denoiser", "fp32")
    case = ProbeCase(3, {**SIZES, "F": frames})
    model = openvino_core().read_model(str(graph.file))
    model.reshape({
        spec.name: [case.sizes[a] if isinstance(a, str) else a for a in spec.axes]
        for spec in graph.component.inputs
    })  # fmt: skip
    before = [node.get_type_name() for node in model.get_ordered_ops()]
    found = drop_lone_softmaxes(model)
    assert found == (bundle.config.depth if gone else 0)
    after = [node.get_type_name() for node in model.get_ordered_ops()]
    # Two projections and the scores of each block; what is weighted stays, as it may be broadcast.
    assert before.count("MatMul") - after.count("MatMul") == 3 * found
    with backend_named("onnxruntime") as other:
        wanted = other.load(graph, "fp32").run(probe_inputs(graph.component, case))
    with closing(backend.load(graph, "fp32")) as engine:
        ours = engine.run(probe_inputs(graph.component, case))
    assert relative(ours["next_state"], wanted["next_state"]) < 1e-5


def test_what_is_exported_piece_by_piece_is_what_is_exported_at_once(bundle, tmp_path):
    device, graph = OpenVinoCpu(), bundle_graph(bundle, "conditioner", "fp32")
    compiled = device.compile(graph, {}, "fp32").compiled
    with (tmp_path / "blob").open("wb") as file:
        compiled.export_model(FileOnly(file))
    assert (tmp_path / "blob").read_bytes() == bytes(compiled.export_model().getbuffer())
