"""What has to hold on a GPU: `pytest -m tensorrt` or `pytest -m rtx`; skipped where there is none.

The same tests run on the simulated GPU everywhere, so that they are known to work when they meet a
real one. Only there do TensorRT, its kernels and the driver have to keep what they claim. With
`-m cuda` the memory, the stream and the graphs are a real GPU's, and the host computes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gentron.agreement import compare
from gentron.bundle import Bundle
from gentron.contract import PRECISIONS
from gentron.engines import Backend, EngineOptions, backend_named, bundle_graph
from gentron.engines.cache import EngineCache
from gentron.errors import BackendError
from gentron.probe import in_compute_type, load_probes, probe_inputs
from gentron.runtime import Pipeline

GENERATIONS = int(os.environ.get("GENTRON_TEST_GENERATIONS", "1000"))
REQUEST = {"seed": 7, "steps": 8, "solver": "ddim", "guidance": 4.0}
BACKENDS = [
    "simulated",
    pytest.param("cuda", marks=pytest.mark.cuda),
    pytest.param("onnxruntime-cuda", marks=pytest.mark.cuda),
    pytest.param("onnxruntime-tensorrt", marks=pytest.mark.tensorrt),
    pytest.param("onnxruntime-rtx", marks=pytest.mark.rtx),
    pytest.param("tensorrt", marks=pytest.mark.tensorrt),
    pytest.param("tensorrt-rtx", marks=pytest.mark.rtx),
]
# Of latents after eight guided steps, by the largest of them: rounding of float16 adds up, and a
# wrong buffer gives 1.
LOOP_TOLERANCE = {"fp32": 2e-3, "fp16": 5e-2}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


class Machine:
    """Where the tests run. Engines are built once and then found."""

    def __init__(self, name: str, folder: Path, simulated):
        self.name, self.simulated = name, simulated
        self.options = EngineOptions(store=EngineCache(folder))
        self.generations = GENERATIONS
        self.stands_in = name in ("simulated", "cuda")  # for TensorRT
        if name == "simulated":
            self.generations = 20
        elif name == "cuda":
            self.generations = min(200, GENERATIONS)
        self._gpu = None

    def backend(self) -> Backend:
        if self.stands_in:
            from gentron.engines.trt_run import TensorRtBackend

            stand_in = "WatchedCuda" if self.name == "cuda" else "SimulatedGpu"
            try:
                self._gpu = getattr(self.simulated, stand_in)()
            except BackendError as error:
                pytest.skip(str(error))
            trt = self.simulated.SimulatedTensorRt(self._gpu, self.simulated.require)
            compiler = self.simulated.SimulatedCompiler()
            return TensorRtBackend(
                "tensorrt", self.options, device=lambda: self._gpu, trt=trt, compiler=compiler
            )
        try:
            return backend_named(self.name, self.options)
        except BackendError as error:
            pytest.skip(str(error))

    def free_bytes(self) -> int:
        """Of the GPU, as the driver counts."""
        if self.name == "simulated":
            return self._gpu.memory - self._gpu.used_bytes
        driver = pytest.importorskip("cuda.bindings.driver")
        error, free, _ = driver.cuMemGetInfo()
        assert int(error) == 0
        return int(free)


@pytest.fixture(scope="module", params=BACKENDS)
def machine(request, tmp_path_factory, simulated) -> Machine:
    return Machine(request.param, tmp_path_factory.mktemp("engines"), simulated)


@pytest.fixture
def backend(machine) -> Iterator[Backend]:
    with machine.backend() as made:
        yield made


def loop_error(found, wanted):
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_component_computes_what_torch_did(bundle, backend, precision):
    checked = 0
    for name, component in bundle.components.items():
        engine = backend.load(bundle_graph(bundle, name, precision), precision)
        for case, reference in load_probes(bundle.path / bundle.manifest.probes[name]):
            if engine.profiles and not any(
                all(case.sizes[axis] in allowed for axis, allowed in profile.items())
                for profile in engine.profiles
            ):
                continue
            feeds = in_compute_type(component, probe_inputs(component, case), engine.compute)
            found = compare(component, PRECISIONS[precision], case, engine.run(feeds), reference,
                            backend.describe())  # fmt: skip
            assert all(agreement.passed for agreement in found), (name, case.sizes, found)
            checked += 1
        engine.close()
    assert checked >= len(bundle.components)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_whole_loop_ends_where_the_cpu_ends(bundle, backend, precision):
    with Pipeline(bundle, backend_named("onnxruntime"), "fp32", "fp32") as cpu:
        wanted = cpu("a cat", batch=2, **REQUEST)
    with Pipeline(bundle, backend, precision, precision) as pipeline:
        found = pipeline("a cat", batch=2, **REQUEST)
    assert loop_error(found.latents, wanted.latents) < LOOP_TOLERANCE[precision]


def test_replay_and_later_requests_equal_the_first_run_to_the_bit(bundle, backend):
    with Pipeline(bundle, backend) as pipeline:
        first = pipeline("a cat", **REQUEST)
        for _ in range(3):
            np.testing.assert_array_equal(pipeline("a cat", **REQUEST).latents, first.latents)


def test_captured_calls_equal_plain_runs_to_the_bit(bundle, backend):
    engine = backend.load(bundle_graph(bundle, "denoiser", "fp16"), "fp16")
    case, _ = load_probes(bundle.path / bundle.manifest.probes["denoiser"])[0]
    feeds = in_compute_type(engine.component, probe_inputs(engine.component, case), engine.compute)
    plain = engine.run(feeds)
    buffers = {name: engine.buffer(name, values.shape) for name, values in feeds.items()}
    buffers |= {name: engine.buffer(name, values.shape) for name, values in plain.items()}
    for name, values in feeds.items():
        buffers[name].write(values)
    call = engine.bind(buffers)
    for _ in range(5):
        call.run()
        np.testing.assert_array_equal(buffers["next_state"].read(), plain["next_state"])
    assert getattr(engine, "captured_calls", 1) == 1  # ONNX Runtime captures none
    engine.close()


def test_a_second_start_gets_the_same_bits(bundle, machine):
    """Engines are found, and for TensorRT-RTX the kernels that were finished before."""
    with Pipeline(bundle, machine.backend()) as pipeline:
        first = pipeline("a cat", **REQUEST)
    with Pipeline(bundle, machine.backend()) as pipeline:
        np.testing.assert_array_equal(pipeline("a cat", **REQUEST).latents, first.latents)


def test_memory_is_flat_over_a_thousand_generations(bundle, machine):
    free = []
    with Pipeline(bundle, machine.backend()) as pipeline:
        for seed in range(machine.generations):
            pipeline("a cat", **REQUEST | {"seed": seed, "steps": 2})
            if seed >= machine.generations // 10:
                free.append(machine.free_bytes())
    drift = max(free) - min(free)
    assert drift < 32 << 20, f"{drift / 1e6:.0f} MB of GPU memory came or went"


def test_loading_again_and_again_gives_all_memory_back(bundle, machine):
    free = []
    for _ in range(min(20, machine.generations // 4)):
        with Pipeline(bundle, machine.backend()) as pipeline:
            pipeline("a cat", **REQUEST | {"steps": 2})
        free.append(machine.free_bytes())
    assert max(free[3:]) - min(free[3:]) < 32 << 20, free


def test_latency_of_each_stage(bundle, backend, record_property, capsys):
    """A table; no claim but that a request that comes again is not slower than the first."""
    rows, where = [], backend.describe()
    with Pipeline(bundle, backend) as pipeline:
        for number in range(20):
            started = time.perf_counter()
            result = pipeline("a cat", **REQUEST | {"seed": number})
            stages = {stage.stage: stage.seconds for stage in result.stages}
            rows.append((time.perf_counter() - started, stages))
    later = rows[5:]
    with capsys.disabled():
        print(f"\n{where}, tiny, {REQUEST['steps']} steps: median of {len(later)}")
        print(f"  {'whole request':<16}{statistics.median(t for t, _ in later) * 1e3:9.2f} ms")
        for name in later[0][1]:
            median = statistics.median(stages[name] for _, stages in later)
            record_property(name, median)
            print(f"  {name:<16}{median * 1e3:9.2f} ms")
    assert min(t for t, _ in later) <= rows[0][0]
