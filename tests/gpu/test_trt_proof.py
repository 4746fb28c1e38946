"""What an engine is found to be when it first runs: kernels and probes, kept with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gentron.bundle import Bundle
from gentron.engines import bundle_graph, trt_run
from gentron.engines.cache import EngineCache
from gentron.engines.trt_build import PLAN
from gentron.engines.trt_flavor import FLAVORS
from gentron.engines.trt_run import prover_here
from gentron.errors import BackendError


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def entries(tmp_path):
    return sorted((tmp_path / "engines").glob("tensorrt*/"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_fresh_engine_tells_its_kernels(bundle, simulated, backend_on, tmp_path, precision):
    backend_on(simulated.SimulatedGpu()).load(
        bundle_graph(bundle, "denoiser", precision), precision
    ).close()
    (folder,) = entries(tmp_path)
    found = json.loads((folder / "entry.json").read_text())["facts"]["kernels"]
    assert found["output_types"] == {"Half" if precision == "fp16" else "Float": 1}
    assert found["fused_attention"]["layers"] == 1


def test_an_engine_whose_kernels_are_wider_than_asked_for_is_not_kept(
    bundle, simulated, backend_on, tmp_path
):
    backend = backend_on(simulated.SimulatedGpu())
    backend._running.trt.kernel_type = "Float"
    message = r"denoiser: fp16 was asked for, and none of the engine's kernels .*\(1 Float\)"
    with pytest.raises(BackendError, match=message):
        backend.load(bundle_graph(bundle, "denoiser", "fp16"), "fp16")
    assert entries(tmp_path) == []


def test_an_inspector_that_answers_otherwise_stops_nothing(
    bundle, simulated, backend_on, tmp_path, caplog
):
    backend = backend_on(simulated.SimulatedGpu())
    backend._running.trt.inspects = False
    backend.load(bundle_graph(bundle, "denoiser", "fp16"), "fp16").close()
    assert "the engine inspector's answer is of an unknown form" in caplog.text
    (folder,) = entries(tmp_path)
    assert "unknown" in json.loads((folder / "entry.json").read_text())["facts"]["kernels"]


def test_an_engine_compiled_where_it_could_not_run_is_proved_once(
    bundle, simulated, backend_on, tmp_path
):
    compiler = simulated.SimulatedCompiler("tensorrt")
    graph = bundle_graph(bundle, "denoiser", "fp32")
    (job,) = compiler.jobs(graph, "fp32", ())
    EngineCache(tmp_path / "engines").obtain(job, compiler, lambda what, share: None)
    proofs = []
    for _ in range(2):
        backend = backend_on(simulated.SimulatedGpu(), compiler=compiler)
        backend.load(graph, "fp32").close()
        proofs.append(backend._running.trt.inspected)
    assert (proofs, compiler.compiled) == ([1, 0], ["denoiser"])
    assert [problem for _, problem in EngineCache(tmp_path / "engines").verify()] == [""]


def test_what_is_built_ahead_of_time_is_proved_where_its_gpu_is(
    bundle, simulated, backend_on, tmp_path, monkeypatch
):
    """What `gentron-build` asks the compiler for."""
    compiler = simulated.SimulatedCompiler("tensorrt")
    compiler.flavor = FLAVORS["tensorrt"]
    (job,) = compiler.jobs(bundle_graph(bundle, "conditioner", "fp32"), "fp32", ())
    assert prover_here(compiler, job) is None  # no GPU in this machine
    monkeypatch.setattr(trt_run, "missing", lambda flavor: "")
    proof = prover_here(
        compiler, job, lambda _, compiler: backend_on(simulated.SimulatedGpu(), compiler=compiler)
    )
    folder = tmp_path / "plan"
    folder.mkdir()
    compiler.compile(job, folder, None)
    assert proof(folder)["probes"]["passed"] >= 1
    values = json.loads((folder / PLAN).read_text())
    (folder / PLAN).write_text(json.dumps(values | {"version": "10.12.0"}))
    with pytest.raises(BackendError, match="Version tag does not match"):
        proof(folder)
