"""TensorRT-RTX really compiles a small bundle, on this machine, without a GPU."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from gentron.bundle import Bundle
from gentron.engines import trt_build
from gentron.engines.cache import EngineCache
from gentron.engines.compiler import Job
from gentron.engines.graphs import bundle_graph
from gentron.engines.shapes import AxisRange
from gentron.engines.trt_build import PLAN, TensorRtCompiler, check_memory
from gentron.engines.trt_flavor import Flavor
from gentron.errors import BackendError, RequestError, ResourceError

trt = pytest.importorskip("tensorrt_rtx_bindings")

GB = 10**9


def quiet(doing: str, share: float) -> None:
    """Shows nothing."""


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def compiler() -> TensorRtCompiler:
    return TensorRtCompiler("tensorrt-rtx")


@pytest.fixture(scope="module")
def job(bundle):
    def make(name: str, precision: str = "fp16", targets: tuple[str, ...] = ()) -> Job:
        graph = bundle_graph(bundle, name, precision)
        return Job(graph, precision, graph.profiles, targets)

    return make


@pytest.fixture(scope="module")
def built(bundle, compiler, job, tmp_path_factory):
    """{component: (facts, folder, reports)}"""
    made = {}
    for name in bundle.components:
        folder, reports = tmp_path_factory.mktemp(name), []
        compiler.check(job(name))
        facts = compiler.build(job(name), folder, lambda *now, to=reports: to.append(now))
        made[name] = (facts, folder, reports)
    return made


def test_every_component_becomes_one_plan(built):
    for name, (facts, folder, _) in built.items():
        (plan,) = folder.iterdir()
        assert plan.name == PLAN
        assert plan.read_bytes()[:4] == b"vtrt"
        assert plan.stat().st_size == facts["plan_bytes"] > 100_000, name


def test_the_facts_say_what_was_built_and_what_it_took(built):
    for name, (facts, _, _) in built.items():
        assert facts["share_of_products"] > 0.6, name
        assert facts["seconds"]["building"] > 0
        assert facts["peak_host_bytes"] > facts["plan_bytes"]
        assert len(facts["warnings"]) <= trt_build.WARNINGS
        json.dumps(facts)
    assert built["denoiser"][0]["attention"]["products_around_softmax"] == 6


def test_progress_rises_to_the_end(built):
    reports = [entry for _, _, reports in built.values() for entry in reports]
    for _, _, shown in built.values():
        shares = [share for _, share in shown]
        assert shares == sorted(shares)
        assert all(0 <= share <= 1 for share in shares)
    assert max(share for _, share in reports) >= 0.5
    assert any("engines" in doing for doing, _ in reports)


def test_the_cache_finds_the_engine_again_and_tells_targets_apart(compiler, job, tmp_path):
    cache = EngineCache(tmp_path / "engines")
    first = cache.obtain(job("conditioner"), compiler, quiet)
    assert first.fresh
    assert list(first.files) == [PLAN]
    again = cache.obtain(job("conditioner"), compiler, quiet)
    assert not again.fresh
    assert again.key == first.key
    assert cache.find(job("conditioner", targets=("sm89",)), compiler) is None


def test_the_identity_holds_what_decides_the_engine(compiler, job):
    plain = compiler.identity(job("text_encoder"))
    assert plain["version"] == trt.__version__
    assert plain["targets"] == ["portable"]
    assert compiler.identity(job("text_encoder", targets=("sm120", "sm86")))["targets"] == [
        "sm86",
        "sm120",
    ]
    for other in (TensorRtCompiler("tensorrt-rtx", workspace=GB),
                  TensorRtCompiler("tensorrt-rtx", level=4)):  # fmt: skip
        assert other.identity(job("text_encoder")) != plain
    json.dumps(plain)


def test_float32_is_not_rounded_where_it_is_there_for_its_digits(compiler, job):
    allowed = {
        name: compiler.identity(job(name))["tf32"]
        for name in ("text_encoder_2", "conditioner", "denoiser", "vae_decoder")
    }
    assert allowed == {
        "text_encoder_2": True,
        "conditioner": False,
        "denoiser": False,
        "vae_decoder": False,
    }
    assert compiler.identity(job("text_encoder_2", "fp32"))["tf32"] is False


def test_options_reach_the_builder(job, monkeypatch):
    compiler = TensorRtCompiler("tensorrt-rtx", workspace=GB, level=1)
    for name, tf32, nans in (("denoiser", False, True), ("text_encoder", True, False)):
        wanted = job(name, targets=("sm89", "sm120"))
        config = compiler._configure(wanted, compiler._parse(wanted))
        assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == GB
        assert config.builder_optimization_level == 1
        assert config.get_flag(trt.BuilderFlag.TF32) is tf32
        assert config.get_flag(trt.BuilderFlag.STRICT_NANS) is nans
        assert config.num_compute_capabilities == 2
        assert config.get_compute_capability(1) == trt.ComputeCapability.SM120
        assert config.num_optimization_profiles == len(wanted.profiles)
        assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    monkeypatch.setenv("GENTRON_WORKSPACE_BYTES", "1000000")
    assert TensorRtCompiler("tensorrt-rtx").workspace == 1_000_000
    monkeypatch.setenv("GENTRON_WORKSPACE_BYTES", "1 GB")
    with pytest.raises(BackendError, match="GENTRON_WORKSPACE_BYTES: a number of bytes"):
        TensorRtCompiler("tensorrt-rtx")


def test_a_float32_graph_is_not_passed_off_as_float16(bundle, compiler, tmp_path):
    graph = bundle_graph(bundle, "text_encoder", "fp32")
    wrong = Job(graph, "fp16", graph.profiles)
    with pytest.raises(BackendError, match=r"fp16 was asked for, but 0.0% .*\(0 of 16 products\)"):
        compiler.check(wrong)
    with pytest.raises(BackendError, match="fp16 was asked for"):
        compiler.build(wrong, tmp_path, quiet)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_not_the_contracts_is_refused_before_the_build(compiler, job):
    wanted = job("conditioner")
    component = replace(wanted.graph.component, inputs=wanted.graph.component.inputs[::-1])
    with pytest.raises(BackendError, match="inputs are timesteps, pooled; the contract's are"):
        compiler.check(replace(wanted, graph=replace(wanted.graph, component=component)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (), r"conditioner has free sizes \(T\); give one profile"),
        (lambda p: ({},), "free sizes T, and a profile for none"),
        (lambda p: ({**p[0], "B": AxisRange.fixed(1)},), "free sizes T, and a profile for B, T"),
    ],
)
def test_profiles_are_checked_before_tensorrt_sees_them(compiler, job, change, message):
    wanted = job("conditioner")
    with pytest.raises(RequestError, match=message):
        compiler.check(replace(wanted, profiles=change(wanted.profiles)))


@pytest.mark.parametrize("target", ["sm90", "sm42"])
def test_a_target_that_cannot_be_is_refused_before_anything_is_parsed(compiler, job, target):
    with pytest.raises(RequestError, match=target):
        compiler.check(job("conditioner", targets=(target,)))


def test_turing_is_refused_for_a_graph_with_float32_products_and_only_then(compiler, job):
    with pytest.raises(RequestError, match=r"sm75 .*float32.* denoiser has 2; leave sm75 out"):
        compiler.check(job("denoiser", targets=("sm75", "sm89")))
    compiler.check(job("text_projection", targets=("sm75",)))


def test_tensorrts_own_error_becomes_one_line_with_the_layer(compiler, job, tmp_path):
    with pytest.raises(BackendError) as caught:
        compiler.build(job("conditioner", targets=("sm75",)), tmp_path, quiet)
    text = str(caught.value)
    assert text.startswith("conditioner: the build failed at node_")
    assert "FP32 GEMM is not supported" in text
    assert "\n" not in text
    assert not list(tmp_path.iterdir())


def graph_of(nodes, initializers=()) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("timesteps", TensorProto.FLOAT, ["T"])
    y = helper.make_tensor_value_info("modulation", TensorProto.FLOAT16, ["T"])
    graph = helper.make_graph(nodes, "graph", [x], [y], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def refused(compiler, job, model: onnx.ModelProto, folder: Path) -> str:
    file = folder / "conditioner.fp16.onnx"
    onnx.save(model, file)
    wanted = job("conditioner")
    with pytest.raises(BackendError) as caught:
        compiler.check(replace(wanted, graph=replace(wanted.graph, file=file)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_graph_that_mixes_types_is_refused_as_it_is_read(compiler, job, tmp_path):
    half = helper.make_tensor("half", TensorProto.FLOAT16, [1], [1.0])
    node = helper.make_node("Add", ["timesteps", "half"], ["modulation"], name="mixed")
    text = refused(compiler, job, graph_of([node], [half]), tmp_path)
    assert text.startswith("conditioner: conditioner.fp16.onnx: Add mixed: ")
    assert "INVALID_NODE" in text
    assert "same input types" in text


def test_an_unknown_operator_is_named(compiler, job, tmp_path):
    node = helper.make_node("Frobnicate", ["timesteps"], ["modulation"], name="odd")
    text = refused(compiler, job, graph_of([node]), tmp_path)
    assert text.startswith("conditioner: conditioner.fp16.onnx: Frobnicate odd: ")
    assert "Plugin not found" in text


def test_truncated_weights_are_told_from_a_bad_graph(compiler, job, bundle, tmp_path):
    folder = Path(shutil.copytree(bundle.path / "transformer", tmp_path / "transformer"))
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 4096)
    wanted = job("conditioner")
    graph = replace(wanted.graph, file=folder / wanted.graph.file.name)
    with pytest.raises(BackendError, match="missing or truncated: copy the bundle again"):
        compiler.check(replace(wanted, graph=graph))


def test_a_missing_graph_is_one_line(compiler, job, tmp_path):
    wanted = job("conditioner")
    graph = replace(wanted.graph, file=tmp_path / "nothing.onnx")
    with pytest.raises(BackendError, match=r"conditioner: nothing.onnx: [^\n]*$"):
        compiler.check(replace(wanted, graph=graph))


def test_a_build_that_needs_more_memory_than_there_is_is_refused_with_the_number(
    compiler, job, monkeypatch
):
    monkeypatch.setenv("GENTRON_BUILD_BYTES", str(100_000_000))
    with pytest.raises(
        ResourceError, match=r"conditioner: compiling it takes about 0.6 GB.*0.1 GB"
    ):
        compiler.check(job("conditioner"))
    monkeypatch.setenv("GENTRON_BUILD_BYTES", str(GB))
    compiler.check(job("conditioner"))


def test_t5_xxl_does_not_fit_on_a_machine_of_24_gib(monkeypatch):
    weights = 11_537_890_462  # of T5-XXL in float16, its float32 products counted as such
    monkeypatch.setenv("GENTRON_BUILD_BYTES", str(24 * 2**30))
    with pytest.raises(ResourceError, match=r"text_encoder_2: .*28.3 GB.*more memory.*--component"):
        check_memory("text_encoder_2", weights, streams=True)
    monkeypatch.setenv("GENTRON_BUILD_BYTES", str(32 * GB))
    check_memory("text_encoder_2", weights, streams=True)
    with pytest.raises(ResourceError, match=r"37\.5 GB"):
        check_memory("text_encoder_2", weights, streams=False)


def test_control_c_during_a_build_ends_its_process_and_leaves_no_plan(compiler, job, tmp_path):
    seen = []

    def report(doing, share):
        seen.append(doing)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compiler.compile(job("denoiser"), tmp_path, report)
    assert seen
    assert not [
        c for c in psutil.Process().children() if "gentron.engines.trt_worker" in c.cmdline()
    ]


def test_a_compile_in_a_process_of_its_own_is_the_build(compiler, job, tmp_path, built):
    told = []
    facts = compiler.compile(job("conditioner"), tmp_path, lambda *now: told.append(now))
    assert [file.name for file in tmp_path.iterdir()] == [PLAN]
    here = built["conditioner"][0]
    assert facts["products"] == here["products"]
    assert facts["weight_bytes"] == here["weight_bytes"]
    assert told


def test_what_a_build_refuses_arrives_from_its_process(compiler, job, tmp_path):
    wrong = replace(job("conditioner"), targets=("sm90",))
    with pytest.raises(RequestError, match="use --backend tensorrt on that machine"):
        compiler.compile(wrong, tmp_path, quiet)


STOPPED = """
import errno, os, pickle, signal, sys, threading
from pathlib import Path
from gentron.engines.trt_build import PLAN, TensorRtCompiler

what, folder = sys.argv[1], Path(sys.argv[2])
job = pickle.load(sys.stdin.buffer)
raised = []

def report(doing, share):
    if what == "control-c":
        os.kill(os.getpid(), signal.SIGINT)
    elif what == "report":
        raise ValueError("nobody listens")

class Full:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

real = Path.open
if what == "disk":
    Path.open = lambda self, *a, **n: Full(real(self, *a, **n)) if self.name == PLAN else real(
        self, *a, **n)

def build():
    try:
        TensorRtCompiler("tensorrt-rtx").build(job, folder, report)
    except (KeyboardInterrupt, ValueError, OSError) as error:
        raised.append(repr(error))

if what == "report":  # in another thread than the main one
    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
else:
    build()
left = [t.name for t in threading.enumerate() if t.name == "tensorrt-build"]
print(raised, list(folder.iterdir()), left)
"""


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("control-c", "['KeyboardInterrupt()']"),
        ("report", "[\"ValueError('nobody listens')\"]"),
        ("disk", "[\"OSError(28, 'No space left on device')\"]"),
    ],
)
def test_a_build_that_is_stopped_raises_why_and_leaves_no_file(job, tmp_path, what, error):
    """In a process of its own, as builds are."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, what, str(tmp_path)],
        input=pickle.dumps(job("conditioner" if what == "disk" else "denoiser")),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.decode().strip() == f"{error} [] []", done.stderr.decode()[-2000:]


def test_where_plans_cannot_be_streamed_they_are_written_whole(
    compiler, job, built, tmp_path, monkeypatch
):
    monkeypatch.setattr(Flavor, "streams", lambda self, trt: False)
    facts = compiler.build(job("conditioner"), tmp_path, quiet)
    assert (tmp_path / PLAN).read_bytes()[:4] == b"vtrt"
    assert facts["plan_bytes"] == pytest.approx(built["conditioner"][0]["plan_bytes"], rel=0.05)


def test_something_that_is_no_engine_is_not_kept(compiler, job, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "flavor", replace(compiler.flavor, header=b"other"))
    with pytest.raises(BackendError, match="the plan begins with b'vtrt"):
        compiler.build(job("conditioner"), tmp_path, quiet)
    assert not list(tmp_path.iterdir())
