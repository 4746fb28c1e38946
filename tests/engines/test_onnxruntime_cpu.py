"""ONNX Runtime on the CPU: bindings share memory with numpy, and nothing falls back silently."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from gentron.bundle import Bundle
from gentron.engines import backend_named, backend_reports, bundle_graph
from gentron.errors import BackendError, RequestError
from gentron.probe import in_compute_type, load_probes, probe_inputs


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def denoiser(bundle):
    backend = backend_named("onnxruntime")
    engine = backend.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    yield engine
    engine.close()
    backend.close()


@pytest.fixture(scope="module")
def probe(bundle):
    """The case with several samples and rows."""
    return load_probes(bundle.path / bundle.manifest.probes["denoiser"])[1]


def bound(engine, inputs):
    """Buffers for every tensor of the denoiser, filled with a probe's inputs."""
    buffers = {name: engine.buffer(name, values.shape) for name, values in inputs.items()}
    for name, values in inputs.items():
        buffers[name].write(values)
    buffers["next_state"] = engine.buffer("next_state", inputs["state"].shape)
    buffers["bad"] = engine.buffer("bad", inputs["state"].shape[:1])
    return buffers


def test_every_golden_probe_passes_on_this_engine(bundle):
    with backend_named("onnxruntime") as backend:
        for name, component in bundle.components.items():
            engine = backend.load(bundle_graph(bundle, name, "fp32"), "fp32")
            for case, expected in load_probes(bundle.path / bundle.manifest.probes[name]):
                outputs = engine.run(probe_inputs(component, case))
                for tensor, wanted in expected.items():
                    scale = max(np.abs(wanted.astype(np.float64)).max(), 1e-9)
                    error = np.abs(outputs[tensor].astype(np.float64) - wanted).max() / scale
                    assert error < 2e-5, (name, tensor, case.sizes)
            engine.close()


def test_a_write_after_binding_is_seen_by_the_next_run(denoiser, probe):
    inputs = probe_inputs(denoiser.component, probe[0])
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


def test_no_two_buffers_share_memory(denoiser, probe):
    buffers = bound(denoiser, probe_inputs(denoiser.component, probe[0]))
    pointers = [buffer.value.data_ptr() for buffer in buffers.values()]
    assert len(set(pointers)) == len(pointers)


def test_an_output_that_is_also_an_input_is_refused(denoiser, probe):
    buffers = bound(denoiser, probe_inputs(denoiser.component, probe[0]))
    buffers["next_state"] = buffers["state"]
    with pytest.raises(AssertionError, match="also an input"):
        denoiser.bind(buffers)


def test_a_thousand_runs_and_rebindings_keep_memory_flat(denoiser, probe):
    buffers = bound(denoiser, probe_inputs(denoiser.component, probe[0]))
    process, sizes = psutil.Process(), []
    for index in range(1000):
        denoiser.bind(buffers).run()
        if index % 100 == 99:
            sizes.append(process.memory_info().rss / 2**20)
    assert sizes[-1] - sizes[3] < 2, sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f | {"state": f["state"].astype(np.float64)}, "expected float32, got float64"),
        (lambda f: f | {"state": f["state"].transpose(0, 1, 2, 3, 5, 4)}, "C-contiguous"),
        (lambda f: f | {"update": f["update"][:, :2].copy()}, "axis 3 must be 3"),
        (lambda f: f | {"slots": f["slots"][:1].copy()}, "axis B must be 2"),
        (lambda f: {k: v for k, v in f.items() if k != "noise"}, r"inputs missing \['noise'\]"),
        (lambda f: f | {"extra": f["noise"]}, r"unknown \['extra'\]"),
    ],
)
def test_feeds_are_checked_against_the_contract(denoiser, probe, change, message):
    feeds = probe_inputs(denoiser.component, probe[0])
    if "transpose" in message or message == "C-contiguous":
        feeds["state"] = np.repeat(feeds["state"], 2, axis=-1)  # unequal sides, then swapped
        feeds["noise"] = np.repeat(feeds["noise"], 2, axis=-1).transpose(0, 1, 2, 4, 3).copy()
    with pytest.raises(RequestError, match=message):
        denoiser.run(change(feeds))


def test_float16_graphs_take_float16_tables(bundle, probe):
    component = bundle.components["denoiser"]
    with backend_named("onnxruntime") as backend:
        engine = backend.load(bundle_graph(bundle, "denoiser", "fp16"), "fp16")
        inputs = in_compute_type(component, probe_inputs(component, probe[0]), "float16")
        out = engine.run(inputs)["next_state"]
        engine.close()
    assert inputs["modulation"].dtype == np.float16
    assert np.abs(out - probe[1]["next_state"]).max() / np.abs(out).max() < 2e-2


def test_a_precision_that_does_not_run_here_is_refused(bundle):
    with backend_named("onnxruntime") as backend, pytest.raises(BackendError, match="bf16"):
        backend.graph_precision("bf16")


def test_a_damaged_graph_is_named(bundle, tmp_path):
    graph = tmp_path / "denoiser.fp32.onnx"
    graph.write_bytes(bundle.graph("denoiser", "fp32").read_bytes()[:5000])
    with (
        backend_named("onnxruntime") as backend,
        pytest.raises(BackendError, match=r"denoiser.fp32.onnx"),
    ):
        backend.load(replace(bundle_graph(bundle, "denoiser", "fp32"), file=graph), "fp32")


def test_an_absent_package_is_reported_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'gentron\[cpu\]'"):
        backend_named("onnxruntime")
    (report,) = [r for r in backend_reports() if r.name == "onnxruntime"]
    assert not report.usable
    assert "pip install" in report.detail


def test_an_unknown_backend_lists_the_known(bundle):
    with pytest.raises(RequestError, match=r"one of .*onnxruntime"):
        backend_named("abacus")


def test_a_closed_engine_refuses_to_bind(bundle, probe):
    component = bundle.components["denoiser"]
    graph = bundle_graph(bundle, "denoiser", "fp32")
    engine = backend_named("onnxruntime").load(graph, "fp32")
    buffers = bound(engine, probe_inputs(component, probe[0]))
    engine.close()
    with pytest.raises(BackendError, match=r"close\(\)"):
        engine.bind(buffers)
