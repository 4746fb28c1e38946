"""Plans without weights take them from the bundle when they are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gentron.bundle import Bundle
from gentron.engines import bundle_graph
from gentron.engines.compiler import Job
from gentron.engines.trt_build import TensorRtCompiler
from gentron.errors import BackendError, RequestError
from gentron.probe import ProbeCase, probe_inputs


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def computed(engine):
    return engine.run(probe_inputs(engine.component, ProbeCase(5, {"T": 3})))["modulation"]


def test_a_stripped_plan_computes_what_a_whole_one_does(bundle, simulated, gpu, backend_on):
    graph = bundle_graph(bundle, "conditioner", "fp32")
    stripped = simulated.SimulatedCompiler("tensorrt", strip=True)
    backend = backend_on(gpu, compiler=stripped)
    fresh = backend.load(graph, "fp32")
    first = computed(fresh)
    fresh.close()
    found = backend.load(graph, "fp32")
    assert stripped.compiled == ["conditioner"]  # the second time it was in the cache
    whole = backend_on(simulated.SimulatedGpu()).load(graph, "fp32")
    assert np.array_equal(first, computed(found))
    assert np.array_equal(first, computed(whole))
    found.close()
    whole.close()


def test_a_whole_plan_is_never_taken_for_a_stripped_one(bundle, simulated, gpu, backend_on):
    graph = bundle_graph(bundle, "conditioner", "fp32")
    backend_on(gpu).load(graph, "fp32").close()
    stripped = simulated.SimulatedCompiler("tensorrt", strip=True)
    backend_on(simulated.SimulatedGpu(), compiler=stripped).load(graph, "fp32").close()
    assert stripped.compiled == ["conditioner"]


def test_weights_that_cannot_be_read_are_one_line(bundle, simulated, gpu, backend_on, tmp_path):
    graph = bundle_graph(bundle, "conditioner", "fp32")
    backend = backend_on(gpu, compiler=simulated.SimulatedCompiler("tensorrt", strip=True))
    backend.load(graph, "fp32").close()
    with pytest.raises(BackendError, match=r"conditioner: .*gone.onnx.*cannot open"):
        backend.load(replace(graph, file=tmp_path / "gone.onnx"), "fp32")


def test_rtx_refuses_to_strip_before_it_parses(bundle):
    graph = bundle_graph(bundle, "conditioner", "fp16")
    with pytest.raises(RequestError, match=r"strip: .* only where there is a GPU; leave --strip"):
        TensorRtCompiler("tensorrt-rtx", strip=True).check(Job(graph, "fp16", graph.profiles))


def test_stripping_is_part_of_the_key(bundle):
    graph = bundle_graph(bundle, "conditioner", "fp16")
    job = Job(graph, "fp16", graph.profiles)
    whole, stripped = (TensorRtCompiler("tensorrt-rtx", strip=s) for s in (False, True))
    assert whole.identity(job) != stripped.identity(job)
