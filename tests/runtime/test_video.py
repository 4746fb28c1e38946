"""Videos through the pipeline: frames as they come, guidance rows, limits, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from gentron.errors import RequestError
from gentron.runtime import Pipeline
from gentron.runtime.pipeline import Pipeline as PipelineClass

FINISH_AND_MEASURE = """
import sys
from pathlib import Path
import numpy as np
from gentron.runtime import Pipeline
from gentron.runtime.video_file import VideoFile

def now(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

def finish(generation):
    with VideoFile(generation.metadata(0), output=Path(), name="clip", fps=8, format="gif") as file:
        for frame in generation.frames():
            file.write(frame[0])

with Pipeline.load(sys.argv[1]) as pipe:
    for count in (8, 8, 64):  # the first for what is loaded once
        generation = pipe.stream("a red car", frames=count, size=(128, 128), steps=1)
        shape = (1, *generation._request.shape)
        noise = np.random.default_rng(0).standard_normal(shape, np.float32)
        generation._latents = noise  # as after the last step, whose own memory is the model's
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = now("VmRSS")
        finish(generation)
        peak = now("VmHWM") - before
        if "first" in globals():
            print(peak)
        first = True
"""

ASK = {"seed": 3, "steps": 2}


def finished(pipeline: Pipeline, **options):
    generation = pipeline.stream("a red car", **{**ASK, **options})
    for _ in generation:
        pass
    return generation


def test_frames_come_one_after_the_other_and_are_those_of_the_result(video_pipeline):
    generation = finished(video_pipeline, frames=3, batch=2)
    frames = list(generation.frames())
    assert [frame.shape for frame in frames] == [(2, 16, 16, 3)] * 3
    result = generation.result()
    assert result.videos.shape == (2, 3, 16, 16, 3)
    assert np.array_equal(np.stack(frames, 1), result.videos)
    assert np.array_equal(result.images, result.videos[:, 0])


def test_stream_video_yields_the_same_frames(video_pipeline):
    direct = finished(video_pipeline, frames=3).result().videos
    streamed = list(video_pipeline.stream_video("a red car", frames=3, **ASK))
    assert np.array_equal(np.stack(streamed, 1), direct)
    default = list(video_pipeline.stream_video("a red car", **ASK))
    assert len(default) == video_pipeline.bundle.config.sample_frames


@pytest.mark.parametrize(
    ("frames", "guidance", "motion", "rows"),
    [
        (4, 7.5, 1.0, 2),
        (4, 7.5, 1.3, 3),
        (4, 1.0, 1.0, 1),
        (4, 1.0, 1.3, 3),
        (4, 2.0, 2.0, 2),  # the branch without text but with motion cancels
        (4, 0.0, 1.0, 1),
        (1, 7.5, 1.3, 2),  # an image has no motion
    ],
)
def test_no_row_is_computed_for_a_branch_of_weight_0(
    video_pipeline, monkeypatch, frames, guidance, motion, rows
):
    seen: set[int] = set()
    engine = video_pipeline._engines["denoiser"]
    bind = engine.bind
    monkeypatch.setattr(engine, "bind", lambda b: (seen.add(b["row_sample"].shape[0]), bind(b))[1])
    finished(video_pipeline, frames=frames, guidance=guidance, motion=motion)
    assert seen == {rows}


def test_text_tables_are_as_large_for_many_frames_as_for_one(video_pipeline):
    """Keys and values of two texts, prompt and empty, whatever the number of frames."""

    def shapes(**options):
        tables = finished(video_pipeline, guidance=4.0, motion=1.2, **options)._loop.tables
        return {name: buffer.shape for name, buffer in tables.items()}

    one, many = shapes(frames=1), shapes(frames=8)
    assert one == many
    assert one["text_kv_1"][0] == 2


def test_motion_changes_a_video_and_never_an_image(video_pipeline):
    def drawn(frames, motion):
        return finished(video_pipeline, frames=frames, motion=motion, guidance=3.0).result()

    assert not np.array_equal(drawn(3, 1.0).latents, drawn(3, 1.3).latents)
    assert np.array_equal(drawn(1, 1.0).latents, drawn(1, 1.3).latents)


@pytest.mark.parametrize("frames", [0, -1, 65, 10**6])
def test_more_frames_than_the_model_has_are_refused_with_the_most(video_pipeline, frames):
    most = video_pipeline.bundle.config.max_frames
    with pytest.raises(RequestError, match=f"frames: must be 1 to {most}"):
        video_pipeline.stream("a red car", frames=frames)


@pytest.mark.parametrize("frames", [2.0, True, "8", None])
def test_frames_must_be_a_whole_number(video_pipeline, frames):
    with pytest.raises(RequestError, match="frames: must be a whole number"):
        video_pipeline.stream("a red car", frames=frames)


def test_a_model_of_images_says_so(tiny_pipeline):
    with pytest.raises(RequestError, match="single images, got 8; use 1"):
        tiny_pipeline.stream("a red car", frames=8)


def test_nothing_is_given_before_every_step_was_run(video_pipeline):
    generation = video_pipeline.stream("a red car", frames=3, **ASK)
    next(iter(generation))
    for early in (generation.result, lambda: next(generation.frames()),
                  lambda: generation.metadata(0)):  # fmt: skip
        with pytest.raises(RequestError, match="not finished"):
            early()


def test_settings_are_known_before_a_frame_is_decoded(video_pipeline, monkeypatch):
    generation = finished(video_pipeline, frames=3, motion=1.2)
    monkeypatch.setattr(PipelineClass, "decode", lambda *_: pytest.fail("decoded"))
    metadata = generation.metadata(0)
    assert (metadata["frames"], metadata["motion"]) == (3, 1.2)
    assert metadata["engines"]["denoiser"]["backend"] == "onnxruntime"


def test_the_memory_of_decoding_does_not_grow_with_the_frames(video_pipeline):
    def peak(frames: int) -> int:
        generation = finished(video_pipeline, frames=frames, steps=1, size=(64, 64))
        tracemalloc.start()
        for _ in generation.frames():
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(8)
    assert peak(64) < 1.2 * peak(8)


def test_decoding_and_writing_take_no_more_memory_for_64_frames_than_for_8(
    tiny_video_bundle, tmp_path
):
    """Of the whole process, engines and encoders included, beyond the latents."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs to start a process's peak anew")
    done = subprocess.run(
        [sys.executable, "-c", FINISH_AND_MEASURE, str(tiny_video_bundle)], cwd=tmp_path,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    few, many = map(float, done.stdout.split())
    frame = 128 * 128 * 3 / 2**20  # MiB, as bytes; four times that as the decoder's floats
    assert many < few + 28 * frame, (few, many)  # of 56 more, half as bytes


def test_a_preview_is_the_first_frame(video_pipeline):
    generation = video_pipeline.stream("a red car", frames=3, **ASK)
    previews = [step.preview() for step in generation]
    assert [p.shape for p in previews] == [(1, 16, 16, 3)] * 2
    difference = previews[-1].astype(int) - generation.result().images
    assert np.abs(difference).max() <= 2
