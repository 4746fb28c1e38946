"""The real pipeline on a GPU: same pictures, no waiting, nothing left behind.

On the simulated one; on CUDA's file above a stand-in for cuda.core; and (`-m cuda`) on a real one,
with its memory, stream and graphs. In each the host computes the networks, with the library that
computes the expected pictures, so whatever differs is memory that was misused.
"""

from __future__ import annotations

import gc
import statistics
from pathlib import Path

import numpy as np
import pytest

from gentron.bundle import Bundle
from gentron.engines import backend_named
from gentron.engines.device_cuda import driver_missing
from gentron.runtime import Pipeline

REQUEST = {"seed": 7, "steps": 6, "solver": "ddim", "guidance": 4.0}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def expected(request, bundle):
    with Pipeline(bundle, backend_named("onnxruntime"), request.param, request.param) as pipeline:
        yield request.param, pipeline("a cat", batch=2, **REQUEST)


on_cuda = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(bool(driver_missing()), reason="no NVIDIA driver")],
)


@pytest.fixture(params=["simulated", "host", on_cuda])
def kind(request):
    return request.param


@pytest.fixture
def gpu(kind, make_gpu):
    device = make_gpu(kind)
    yield device
    device.close()
    assert device.faults == []


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_pictures_are_those_of_the_cpu_to_the_bit(expected, bundle, gpu, backend_on, name):
    precision, wanted = expected
    with Pipeline(bundle, backend_on(gpu, name), precision, precision) as pipeline:
        for _ in range(3):  # plain runs, captured work, captured work from the start
            found = pipeline("a cat", batch=2, **REQUEST)
            np.testing.assert_array_equal(found.latents, wanted.latents)
            np.testing.assert_array_equal(found.images, wanted.images)
    assert {c.device for c in found.components} == {gpu.name}


def test_noise_of_a_stochastic_solver_arrives_in_time(bundle, gpu, backend_on):
    request = REQUEST | {"solver": "ddpm", "steps": 5}
    with Pipeline(bundle, backend_named("onnxruntime")) as pipeline:
        wanted = pipeline("a dog", batch=3, **request)
    with Pipeline(bundle, backend_on(gpu), "fp32", "fp32") as pipeline:
        found = pipeline("a dog", batch=3, **request)
    np.testing.assert_array_equal(found.latents, wanted.latents)


def test_a_step_runs_while_the_host_prepares_the_next(bundle, kind, gpu, backend_on):
    """Of a step only its predecessor's `bad` is waited for: the step itself is still queued."""
    if kind == "host":
        pytest.skip("there everything runs at once")
    gpu.delay = 0.02  # of a network on a real GPU, in seconds
    with Pipeline(bundle, backend_on(gpu), "fp32", "fp32") as pipeline:
        generation = pipeline.stream("a cat", **REQUEST)
        for step in generation:
            waiting = gpu.pending.count("execute")
            assert waiting == (1 if step.index < step.total - 1 else 0), step
        generation.result()


def test_waiting_for_the_whole_stream_would_be_noticed(bundle, gpu, backend_on, monkeypatch):
    """The test above is able to fail: `bad` read after the next step was queued waits for it."""
    from gentron.engines.device_buffers import DeviceBuffer

    at_once = DeviceBuffer.start_read

    def later(buffer):
        return lambda: at_once(buffer)()  # noqa: PLW0108  this is the mistake

    monkeypatch.setattr(DeviceBuffer, "start_read", later)
    with Pipeline(bundle, backend_on(gpu), "fp32", "fp32") as pipeline:
        steps = iter(pipeline.stream("a cat", **REQUEST))
        next(steps), next(steps)
        assert gpu.pending.count("execute") == 0
        for _ in steps:
            pass


def test_a_step_sends_a_few_hundred_bytes_and_waits_for_one_event(bundle, gpu, backend_on):
    with Pipeline(bundle, backend_on(gpu), "fp32", "fp32") as pipeline:
        pipeline("a cat", **REQUEST)  # captures
        per_step, before = [], None
        for _ in pipeline.stream("a cat", **REQUEST):
            now = gpu.counts.copy()
            if before is not None:
                per_step.append(now - before)
            before = now
    for step in per_step[:-1]:
        assert 0 < step["bytes_up"] < 500
        assert step["uploads"] <= 2  # which rows of the tables, and the solver's update
        assert step["bytes_down"] == 1  # `bad`
        assert step["waits"] == 1
        assert step["synchronize"] == step["allocations"] == step["captures"] == 0
        assert step["launches"] == 1
    assert per_step[-1]["waits"] == 2  # the last step's `bad` as well


def test_a_second_request_of_the_same_kind_captures_nothing_and_allocates_nothing(
    bundle, gpu, backend_on
):
    with Pipeline(bundle, backend_on(gpu), "fp32", "fp32") as pipeline:
        for _ in range(2):
            pipeline("a cat", **REQUEST)
        before = gpu.counts.copy()
        pipeline("a cat", **REQUEST | {"seed": 8})
        made = gpu.counts - before
    assert made["captures"] == made["allocations"] == 0
    assert made["launches"] >= REQUEST["steps"]


def test_tensorrt_rtx_captures_each_binding_once(bundle, gpu, backend_on):
    """Its own captures are thrown away when an address changes; the two directions of the loop
    would do that at every step if they shared a context."""
    with Pipeline(bundle, backend_on(gpu, "tensorrt-rtx"), "fp32", "fp32") as pipeline:
        pipeline("a cat", **REQUEST)
        first = gpu.counts["recaptures"]
        for seed in range(3):
            pipeline("a cat", **REQUEST | {"seed": seed})
        assert gpu.counts["recaptures"] - first <= 4  # encoders and decoder, met again
    assert 2 <= first <= 6


def test_memory_is_flat_over_many_generations(bundle, gpu, backend_on):
    used = []
    with Pipeline(bundle, backend_on(gpu), "fp32", "fp32") as pipeline:
        for seed in range(12):
            pipeline("a cat", **REQUEST | {"seed": seed, "steps": 2})
            used.append((gpu.used_bytes, len(gpu.host_blocks), len(gpu.captured)))
    assert len(set(used[3:])) == 1, used


def test_a_request_that_is_dropped_halfway_leaves_nothing_in_use(bundle, gpu, backend_on):
    backend = backend_on(gpu)
    with Pipeline(bundle, backend, "fp32", "fp32") as pipeline:
        wanted = pipeline("a cat", **REQUEST)
        steps = iter(pipeline.stream("a bird", **REQUEST))
        next(steps), next(steps)
        del steps
        found = pipeline("a cat", **REQUEST)
        gc.collect()
        assert backend._arena.tensors.used_bytes == 0
    np.testing.assert_array_equal(found.latents, wanted.latents)


def test_previews_do_not_disturb_the_run(bundle, gpu, backend_on):
    with Pipeline(bundle, backend_on(gpu), "fp32", "fp32") as pipeline:
        wanted = pipeline("a cat", **REQUEST)
        generation = pipeline.stream("a cat", **REQUEST)
        previews = [step.preview() for step in generation]
        np.testing.assert_array_equal(generation.result().latents, wanted.latents)
    assert len(previews) == REQUEST["steps"]


def test_threads_share_the_gpu_and_each_gets_its_own_pictures(bundle, gpu, backend_on):
    from concurrent.futures import ThreadPoolExecutor

    with Pipeline(bundle, backend_on(gpu), "fp32", "fp32") as pipeline:
        wanted = {seed: pipeline("a cat", **REQUEST | {"seed": seed}).latents for seed in range(3)}
        with ThreadPoolExecutor(3) as threads:
            found = threads.map(
                lambda seed: pipeline("a cat", **REQUEST | {"seed": seed}).latents, [0, 1, 2] * 2
            )
        for seed, latents in zip([0, 1, 2] * 2, found, strict=True):
            np.testing.assert_array_equal(latents, wanted[seed])


def test_loading_and_closing_gives_everything_back(bundle, kind, make_gpu, backend_on):
    for _ in range(3):
        gpu = make_gpu(kind)
        pipeline = Pipeline(bundle, backend_on(gpu), "fp32", "fp32")
        pipeline("a cat", **REQUEST)
        pipeline.close()
        assert gpu.leaks() == []
        assert gpu.faults == []


@pytest.mark.parametrize("kind", ["host", on_cuda])
def test_the_host_is_done_with_a_step_in_less_than_a_millisecond(
    bundle, gpu, backend_on, record_property, capsys
):
    """With networks that do nothing: rows packed, written and sent, one launch, one flag read."""
    with Pipeline(bundle, backend_on(gpu), "fp16", "fp32") as pipeline:
        pipeline("a cat", **REQUEST)  # engines are proved before networks do nothing
        gpu.empty = True
        request = REQUEST | {"steps": 100}
        for _ in range(2):
            seconds = [step.seconds for step in pipeline.stream("a dog", **request)][10:-1]
    median = statistics.median(seconds)
    record_property("seconds", median)
    with capsys.disabled():
        print(f"\n{gpu.name}: the host takes {median * 1e6:.0f} us for a step of an empty network")
    assert median < 1e-3


def test_what_the_device_wrote_is_written_again_by_the_host(bundle, gpu, backend_on):
    """Small inputs that did not change are not sent; a state that was an output did change."""
    from gentron.engines import bundle_graph
    from gentron.probe import load_probes, probe_inputs

    engine = backend_on(gpu).load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    case, _ = load_probes(bundle.path / bundle.manifest.probes["denoiser"])[0]
    inputs = probe_inputs(engine.component, case)
    buffers = {name: engine.buffer(name, values.shape) for name, values in inputs.items()}
    buffers["next_state"] = engine.buffer("next_state", inputs["state"].shape)
    buffers["bad"] = engine.buffer("bad", inputs["state"].shape[:1])
    for name, values in inputs.items():
        buffers[name].write(values)
    forward = engine.bind(buffers)
    swapped = {"state": buffers["next_state"], "next_state": buffers["state"]}
    backward = engine.bind(buffers | swapped)
    forward.run()
    first = buffers["next_state"].read()
    backward.run()  # overwrites what the host wrote
    buffers["state"].write(inputs["state"])
    forward.run()
    np.testing.assert_array_equal(buffers["next_state"].read(), first)
    engine.close()
