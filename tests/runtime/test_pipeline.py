"""The pipeline as an application sees it: repeatable, shareable between threads, cancellable."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from gentron.errors import BackendError, BundleError, RequestError
from gentron.runtime import Pipeline
from gentron.runtime.generation import RANDOM_WEIGHTS


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_the_same_request_gives_the_same_bytes_whatever_ran_between(tiny_pipeline):
    first = [tiny_pipeline("a cat", seed=1, batch=2).images.tobytes() for _ in range(3)]
    other = tiny_pipeline("a cat", seed=1, size=(48, 32))
    assert other.images.shape == (1, 32, 48, 3)
    again = tiny_pipeline("a cat", seed=1, batch=2).images.tobytes()
    assert set(first) == {again}


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++2m", "unipc"])
def test_a_row_of_a_batch_equals_its_single(tiny_pipeline, solver):
    options = {"solver": solver, "steps": 5}
    batch = tiny_pipeline("a cat", seed=40, batch=4, **options)
    assert batch.seeds == (40, 41, 42, 43)
    for row, seed in enumerate(batch.seeds):
        single = tiny_pipeline("a cat", seed=seed, **options)
        assert relative(batch.latents[row], single.latents[0]) < 1e-3
    assert relative(batch.latents[0], batch.latents[1]) > 0.1


def test_eight_threads_get_what_serial_calls_get(tiny_pipeline):
    requests = [
        {"prompt": f"thing {i}", "seed": i, "steps": 2 + i % 4, "batch": 1 + i % 2,
         "solver": ("ddim", "dpm++2m", "ddpm", "unipc")[i % 4]}
        for i in range(24)
    ]  # fmt: skip
    serial = [tiny_pipeline(**request).images.tobytes() for request in requests]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda r: tiny_pipeline(**r).images.tobytes(), requests))
    assert parallel == serial


def test_loading_and_closing_twenty_times_keeps_memory_flat(tiny_bundle):
    process = psutil.Process()
    sizes = []
    for _ in range(20):
        with Pipeline.load(tiny_bundle) as pipeline:
            pipeline("a cat", seed=1, steps=1)
        sizes.append(process.memory_info().rss / 2**20)
    # One leaked set of weights and sessions is several MiB a round.
    assert np.polyfit(range(10), sizes[10:], 1)[0] < 1.0, sizes


def test_many_runs_of_one_pipeline_keep_memory_flat(tiny_pipeline):
    process = psutil.Process()
    sizes = []
    for index in range(300):
        tiny_pipeline(f"a cat {index % 100}", seed=index, steps=2)
        if index % 25 == 0:
            sizes.append(process.memory_info().rss / 2**20)
    assert sizes[-1] - sizes[len(sizes) // 2] < 4, sizes


def test_a_stream_reports_every_step_and_then_the_result(tiny_pipeline):
    generation = tiny_pipeline.stream("a cat", seed=1, steps=3)
    with pytest.raises(RequestError, match="not finished"):
        generation.result()
    steps = list(generation)
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert all(step.seconds > 0 for step in steps)
    direct = tiny_pipeline("a cat", seed=1, steps=3)
    assert np.array_equal(generation.result().images, direct.images)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++2m", "unipc"])
def test_the_preview_of_the_last_step_is_the_picture(tiny_pipeline, solver):
    generation = tiny_pipeline.stream("a cat", seed=1, steps=4, solver=solver)
    previews = [step.preview() for step in generation]
    assert [p.shape for p in previews] == [(1, 16, 16, 3)] * 4
    difference = previews[-1].astype(int) - generation.result().images
    assert np.abs(difference).max() <= 1
    assert not np.array_equal(previews[0], previews[-1])


def test_a_preview_of_a_passed_step_is_refused(tiny_pipeline):
    steps = iter(tiny_pipeline.stream("a cat", seed=1, steps=3))
    first = next(steps)
    next(steps)
    with pytest.raises(RequestError, match="step 1 has passed"):
        first.preview()


def test_leaving_a_stream_cancels_it_and_the_pipeline_goes_on(tiny_pipeline):
    for step in tiny_pipeline.stream("a cat", seed=1, steps=50):
        if step.index == 1:
            break
    assert tiny_pipeline("a cat", seed=1).images.shape == (1, 16, 16, 3)


def test_the_result_says_what_ran_where_and_for_how_long(tiny_pipeline):
    result = tiny_pipeline("something new to encode", seed=1, steps=3)
    assert [s.stage for s in result.stages] == ["text", "condition", "denoise", "decode"]
    assert [s.calls for s in result.stages] == [2, 2, 3, 1]
    assert all(s.seconds > 0 for s in result.stages)
    assert {c.component for c in result.components} == set(tiny_pipeline.bundle.components)
    assert {(c.backend, c.device, c.precision) for c in result.components} == {
        ("onnxruntime", "cpu", "float32")
    }
    assert result.weights == "random"
    assert RANDOM_WEIGHTS in result.warnings


def test_a_prompt_is_encoded_once(tiny_bundle):
    with Pipeline.load(tiny_bundle) as pipeline:
        engine = pipeline._engines["text_encoder"]
        runs, original = [], engine.run
        engine.run = lambda feeds: runs.append(1) or original(feeds)
        pipeline("a cat", seed=1, steps=1)
        pipeline("a cat", seed=2, steps=1, negative="a dog")
        pipeline("a dog", seed=3, steps=1)
    assert len(runs) == 2  # "a cat", "a dog"; the empty text is stored


def test_the_stored_empty_text_is_what_the_encoder_gives(tiny_pipeline):
    stage = tiny_pipeline._text
    stored, computed = stage._one(""), stage._run("")
    for a, b in zip(stored.hidden, computed.hidden, strict=True):
        assert relative(a, b) < 1e-5
    assert all(np.array_equal(a, b) for a, b in zip(stored.mask, computed.mask, strict=True))
    assert relative(stored.pooled, computed.pooled) < 1e-5


def test_guidance_one_needs_no_empty_text_and_half_the_rows(tiny_pipeline):
    plain = tiny_pipeline("a cat", seed=1, guidance=1.0, negative="a dog")
    assert np.array_equal(plain.images, tiny_pipeline("a cat", seed=1, guidance=1.0).images)
    guided = tiny_pipeline("a cat", seed=1, guidance=4.0, negative="a dog")
    assert relative(guided.latents, plain.latents) > 1e-3


def test_float16_graphs_give_nearly_the_same_latents(tiny_bundle, tiny_pipeline):
    with Pipeline.load(tiny_bundle, precision="fp16") as half:
        result = half("a cat", seed=1)
        found = {c.component: c.precision for c in result.components}
    assert found.pop("vae_decoder") == "float32"  # its own setting
    assert set(found.values()) == {"float16"}
    assert relative(result.latents, tiny_pipeline("a cat", seed=1).latents) < 2e-2


def test_a_closed_pipeline_says_so(tiny_bundle):
    pipeline = Pipeline.load(tiny_bundle)
    pipeline.close()
    pipeline.close()
    with pytest.raises(BackendError, match="closed"):
        pipeline("a cat")


def test_a_precision_that_is_not_in_the_bundle_is_an_error(tiny_copy):
    manifest = json.loads((tiny_copy / "gentron.json").read_text("utf-8"))
    manifest["precisions"] = {name: ["fp32"] for name in manifest["precisions"]}
    (tiny_copy / "gentron.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match="has no fp16 graph, only fp32"):
        Pipeline.load(tiny_copy, backend="onnxruntime", precision="fp16")


def test_a_precision_that_the_backend_does_not_have_is_an_error(tiny_bundle):
    with pytest.raises(BackendError, match=r"does not compute in bf16 .*; use fp32 or fp16"):
        Pipeline.load(tiny_bundle, backend="onnxruntime", precision="bf16")


def test_seeds_are_drawn_anew_when_none_is_given(tiny_pipeline):
    seeds = {tiny_pipeline("a cat", steps=1).settings.seed for _ in range(4)}
    assert len(seeds) == 4


def test_threads_do_not_outlive_a_pipeline(tiny_bundle):
    before = threading.active_count()
    with Pipeline.load(tiny_bundle) as pipeline:
        pipeline("a cat", seed=1, steps=1)
    assert threading.active_count() == before
