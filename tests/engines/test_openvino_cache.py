"""OpenVINO's compiled models on disk: proved before they are kept, imported ever after."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino", reason="not installed; pip install '.[dev]'")

from gentron.bundle import Bundle
from gentron.engines import EngineOptions, backend_named, bundle_graph, openvino_compiler
from gentron.engines.cache import EngineCache
from gentron.engines.folder import EngineFolder, write_folder
from gentron.engines.openvino_compiler import BLOB, OpenVinoCompiler
from gentron.engines.openvino_engine import OpenVinoCpu
from gentron.engines.shapes import AxisRange
from gentron.engines.store import ENTRY
from gentron.errors import BackendError, RequestError, ResourceError
from gentron.probe import ProbeCase, probe_inputs
from gentron.weights import stored_tensors

SIZES = {"B": 1, "R": 2, "F": 1, "T": 3, "U": 1, "h": 4, "w": 6}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    return EngineOptions(store=EngineCache(tmp_path / "engines"))


@pytest.fixture
def no_compiler(monkeypatch):
    """From then on, compiling fails the test."""

    def stop():
        monkeypatch.setattr(OpenVinoCpu, "compile", lambda *_: pytest.fail("was compiled again"))

    return stop


def modulation(options, graph, precision="fp32"):
    """What the conditioner gives, on a backend made for this call alone."""
    with backend_named("openvino", options) as backend:
        engine = backend.load(graph, precision)
        found = engine.run(probe_inputs(engine.component, ProbeCase(5, {"T": 3})))["modulation"]
        engine.close()
    return found


def states(options, graph, **sizes):
    """The same for the denoiser."""
    with backend_named("openvino", options) as backend:
        engine = backend.load(graph, "fp32")
        inputs = probe_inputs(engine.component, ProbeCase(5, SIZES | sizes))
        found = engine.run(inputs)["next_state"]
        engine.close()
    return found


def test_the_second_time_it_is_imported_and_gives_the_same_bits(bundle, options, no_compiler):
    graph = bundle_graph(bundle, "denoiser", "fp32")
    first = states(options, graph)
    (entry,) = options.store.entries()
    assert set(entry.files) == {BLOB}
    (shape,) = entry.key.profiles
    assert {axis: size.usual for axis, size in shape.items()} == {
        axis: SIZES[axis] for axis in "BRFhw"
    }
    no_compiler()
    assert np.array_equal(states(options, graph), first)
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        states(options, graph, R=3)


def test_what_is_float32_anyway_is_stored_once_for_both_precisions(bundle, options, no_compiler):
    if "bf16" not in OpenVinoCpu().precisions:
        pytest.skip("this CPU has no bfloat16: sharing was NOT tested")
    graph = bundle_graph(bundle, "conditioner", "fp32")
    first = modulation(options, graph)
    no_compiler()
    assert np.array_equal(modulation(options, graph, "bf16"), first)
    assert [entry.key.precision for entry in options.store.entries()] == ["fp32"]


def test_the_probes_of_its_shape_are_what_a_fresh_model_has_passed(bundle, options):
    modulation(options, bundle_graph(bundle, "conditioner", "fp32"))
    (entry,) = options.store.entries()
    assert entry.facts["probes"]["passed"] == 3
    assert 0 < entry.facts["probes"]["worst_relative"] < 5e-5
    states(options, bundle_graph(bundle, "denoiser", "fp32"), h=8)
    (other,) = [e for e in options.store.entries() if e.key.component == "denoiser"]
    assert other.facts["probes"] == "none of these shapes"


@pytest.mark.parametrize("kept", [True, False], ids=["to be cached", "in memory only"])
def test_a_model_that_computes_something_else_is_refused_and_not_stored(
    bundle, tiny_copy, options, kept
):
    stored = stored_tensors(tiny_copy / "transformer")["conditioner.adaln.0.weight"]
    values = np.memmap(stored.file, np.uint8, "r+", stored.offset, stored.length)
    values[1::2] ^= 0x80  # the signs, little endian
    values.flush()
    wrong = tiny_copy / "transformer" / "conditioner.fp32.onnx"
    graph = replace(bundle_graph(bundle, "conditioner", "fp32"), file=wrong)
    graph = graph if kept else replace(graph, digest="")
    with pytest.raises(BackendError, match=r"openvino: .*conditioner.*modulation.* off by"):
        modulation(options, graph)
    assert options.store.entries() == []


def test_a_graph_without_a_digest_is_compiled_in_memory(bundle, options):
    graph = bundle_graph(bundle, "conditioner", "fp32")
    found = modulation(options, replace(graph, digest=""))
    assert not options.store.folder.exists()
    assert np.allclose(found, modulation(options, graph), rtol=0, atol=1e-6)


def test_a_model_that_cannot_be_imported_is_set_aside_and_built_again(bundle, options, caplog):
    graph = bundle_graph(bundle, "conditioner", "fp32")
    first = modulation(options, graph)
    (entry,) = options.store.entries()
    blob = entry.folder / BLOB
    blob.write_bytes(b"what another version might have written" * 100)
    digest = {"sha256": hashlib.sha256(blob.read_bytes()).hexdigest(), "size": blob.stat().st_size}
    values = json.loads((entry.folder / ENTRY).read_text("utf-8"))
    (entry.folder / ENTRY).write_text(json.dumps(values | {"files": {BLOB: digest}}), "utf-8")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(modulation(options, graph), first)
    (warning,) = caplog.messages
    assert "cannot load it" in warning
    assert "set aside" in warning
    (again,) = options.store.entries()
    assert again.key == entry.key
    assert again.size == entry.size  # of the whole model again


# --- engines built elsewhere ---


def in_folder(options, tmp_path):
    sha256 = write_folder(tmp_path / "deploy", options.store.entries())
    return EngineOptions(store=EngineFolder(tmp_path / "deploy", sha256))


def test_a_folder_of_engines_runs_its_shape_and_refuses_every_other(
    bundle, options, tmp_path, no_compiler
):
    graph = bundle_graph(bundle, "denoiser", "fp32")
    first = states(options, graph)
    deployed = in_folder(options, tmp_path)
    no_compiler()
    assert np.array_equal(states(deployed, graph), first)
    with pytest.raises(BackendError, match=r"denoiser in fp32 \(compiled for other shapes\)"):
        states(deployed, graph, B=2)


def test_a_folder_made_on_another_machine_is_refused_by_name(
    bundle, options, tmp_path, monkeypatch
):
    graph = bundle_graph(bundle, "conditioner", "fp32")
    modulation(options, graph)
    deployed = in_folder(options, tmp_path)
    monkeypatch.setattr(openvino_compiler, "cpu_name", lambda: "another processor")
    with pytest.raises(BackendError, match=r"its cpu is .*, here it is .*another processor"):
        modulation(deployed, graph)


# --- the compiler by itself ---


@pytest.fixture(scope="module")
def compiler() -> OpenVinoCompiler:
    return OpenVinoCompiler(EngineOptions())


def test_one_job_for_the_usual_sizes_of_each_declared_shape(bundle, compiler):
    graph = bundle_graph(bundle, "denoiser", "fp32")
    (usual,) = graph.profiles
    wide = {**usual, "w": AxisRange.fixed(12), "T": AxisRange(1, 80, 99)}
    longer = {**usual, "T": AxisRange(1, 9, 9)}  # differs in what a model leaves open
    jobs = compiler.jobs(replace(graph, profiles=(usual, wide, longer)), "fp32")
    assert [job.profiles[0]["w"].usual for job in jobs] == [usual["w"].usual, 12]
    for job in jobs:
        assert not job.graph.flexible
        assert set(job.profiles[0]) == set("BRFhw")
        assert all(size.is_fixed for size in job.profiles[0].values())
    (encoder,) = compiler.jobs(bundle_graph(bundle, "text_encoder", "fp32"), "fp32")
    assert encoder.profiles == ({},)


def test_whatever_changes_a_model_changes_its_identity(bundle, compiler):
    (job,) = compiler.jobs(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    identity = compiler.identity(job)
    assert identity == OpenVinoCompiler(EngineOptions()).identity(job)
    assert identity["hint"] == "f32"
    assert identity["version"].startswith("20")
    assert identity != compiler.identity(replace(job, precision="bf16"))
    assert identity != OpenVinoCompiler(EngineOptions(threads=1)).identity(job)


def test_another_version_or_processor_is_refused_and_more_threads_are_not(bundle, compiler):
    (job,) = compiler.jobs(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    identity = dict(compiler.identity(job))
    assert compiler.refusal(identity | {"threads": 64}, ()) == ""
    for name in ("version", "cpu", "capabilities"):
        refusal = compiler.refusal(identity | {name: "other"}, ())
        assert refusal == f"its {name} is other, here it is {identity[name]}"
    assert "sm89" in compiler.refusal(identity, ("sm89",))


def test_what_cannot_work_is_refused_before_it_is_started(bundle, compiler, monkeypatch):
    graph = bundle_graph(bundle, "denoiser", "fp32")
    (job,) = compiler.jobs(graph, "fp32")
    compiler.check(job)
    with pytest.raises(RequestError, match=r"gpu: .*leave --gpu out"):
        compiler.check(replace(job, targets=("sm89",)))
    with pytest.raises(RequestError, match=r"precision: .*not fp16"):
        compiler.graph_precision("fp16")
    monkeypatch.setattr(openvino_compiler, "available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"compiling denoiser needs about .* GB of memory, 0.0"):
        compiler.check(job)
    monkeypatch.setattr(openvino_compiler, "available_bytes", lambda: None)
    compiler.check(job)


def test_the_number_of_threads_is_what_was_asked_for(bundle, compiler):
    graph = bundle_graph(bundle, "conditioner", "fp32")
    model = OpenVinoCpu(1).compile(graph, {}, "fp32")
    assert model.compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_where_nothing_can_be_kept_it_compiles_in_memory_and_says_so(bundle, tmp_path, caplog):
    folder = tmp_path / "open to all"
    folder.mkdir()
    folder.chmod(0o777)
    graph = bundle_graph(bundle, "conditioner", "fp32")
    kept = modulation(EngineOptions(store=EngineCache(tmp_path / "engines")), graph)
    assert np.array_equal(modulation(EngineOptions(store=EngineCache(folder)), graph), kept)
    assert "every start compiles anew" in caplog.text
    assert list(folder.iterdir()) == []
