"""Guidance in a limited interval: which steps it leaves alone, what they cost, what comes out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gentron.errors import RequestError
from gentron.runtime import Pipeline
from gentron.runtime.generation import Generation
from gentron.runtime.repeat import settings_of
from gentron.solvers import solver_table

ASK = {"seed": 3, "steps": 5, "guidance": 4.0}
EVERYWHERE = (0.0, 1e9)
NOWHERE = (1e8, 1e9)


def finished(pipeline: Pipeline, **options) -> Generation:
    generation = pipeline.stream("a red car", **{**ASK, **options})
    for _ in generation:
        pass
    return generation


def middle(pipeline: Pipeline) -> tuple[float, float]:
    """Noise levels that steps 2 to 4 of 5 lie in, and the others do not."""
    bundle = pipeline.bundle
    table = solver_table(bundle.manifest.defaults.solver, bundle.schedule, ASK["steps"])
    sigmas = bundle.schedule.sigmas(table.timesteps)
    return float(sigmas[4]), float(sigmas[1])


@pytest.mark.parametrize(
    ("frames", "motion", "rows"),
    [(1, 1.0, [1, 2, 2, 2, 1]), (3, 1.0, [1, 2, 2, 2, 1]), (3, 1.3, [1, 3, 3, 3, 1])],
)
def test_a_step_outside_the_interval_runs_one_row(
    video_pipeline, monkeypatch, frames, motion, rows
):
    seen: list[int] = []
    engine = video_pipeline._engines["denoiser"]
    bind = engine.bind

    def counting(buffers):
        call, count = bind(buffers), buffers["row_sample"].shape[0]
        run = call.run
        call.run = lambda: (seen.append(count), run())[1]
        return call

    monkeypatch.setattr(engine, "bind", counting)
    finished(video_pipeline, frames=frames, motion=motion, guidance_interval=middle(video_pipeline))
    assert seen == rows


def test_unguided_steps_need_no_conditioning_of_the_empty_text(tiny_pipeline):
    generation = finished(tiny_pipeline, guidance_interval=middle(tiny_pipeline))
    assert tiny_pipeline.bundle.config.pooled_width  # so that rows belong to one text each
    modulation = generation._loop.conditioning.modulation
    assert [text.prompt for text, _ in modulation] == ["a red car"] * 5 + [""] * 3


@pytest.mark.parametrize("frames", [1, 3])
def test_an_interval_around_every_step_is_guidance_as_ever(video_pipeline, frames):
    always = finished(video_pipeline, frames=frames, motion=1.3).result()
    around = finished(video_pipeline, frames=frames, motion=1.3, guidance_interval=EVERYWHERE)
    assert np.array_equal(around.result().latents, always.latents)
    assert around.settings.guidance_interval != always.settings.guidance_interval


@pytest.mark.parametrize("frames", [1, 3])
def test_an_interval_without_a_step_is_no_guidance_and_says_so(video_pipeline, frames):
    never = finished(video_pipeline, frames=frames, guidance=1.0, motion=1.0).result()
    outside = finished(video_pipeline, frames=frames, guidance_interval=NOWHERE, motion=1.3)
    assert np.array_equal(outside.result().latents, never.latents)
    assert any("no step lies in it" in warning for warning in outside.warnings)


def test_each_step_is_the_guided_or_the_unguided_one(tiny_pipeline):
    """The state before the first guided step is that of a run without guidance."""
    runs = {
        name: tiny_pipeline.stream("a red car", **{**ASK, **options})
        for name, options in {
            "limited": {"guidance_interval": middle(tiny_pipeline)},
            "never": {"guidance": 1.0},
            "always": {},
        }.items()
    }
    after = {}
    for name, generation in runs.items():
        after[name] = [generation._loop.before_and_after()[1].copy() for _ in generation]
    assert np.array_equal(after["limited"][0], after["never"][0])
    assert not np.array_equal(after["limited"][0], after["always"][0])
    assert not np.array_equal(after["limited"][1], after["never"][1])


def test_a_batch_row_equals_its_single_with_an_interval(tiny_pipeline):
    interval = middle(tiny_pipeline)
    both = finished(tiny_pipeline, batch=2, guidance_interval=interval).result()
    alone = finished(tiny_pipeline, seed=4, guidance_interval=interval).result()
    assert np.abs(both.latents[1] - alone.latents[0]).max() < 1e-5


def test_the_settings_carry_it_through_json(tiny_pipeline):
    interval = middle(tiny_pipeline)
    generation = finished(tiny_pipeline, guidance_interval=interval)
    metadata = json.loads(json.dumps(generation.metadata(0)))
    settings, _ = settings_of(metadata)
    assert settings == generation.settings
    assert settings.guidance_interval == interval
    repeated = tiny_pipeline.generate(settings)
    for _ in repeated:
        pass
    assert np.array_equal(repeated.result().images, generation.result().images)


def test_files_older_than_the_setting_had_none(tiny_pipeline):
    metadata = finished(tiny_pipeline).metadata(0)
    del metadata["guidance_interval"]
    assert settings_of(metadata)[0].guidance_interval is None


@pytest.mark.parametrize(
    "interval",
    [(1.0, 0.5), (0.5, 0.5), (-1.0, 2.0), (0.0, float("nan")), (0.0, float("inf")),
     (0.0, 1.0, 2.0), (), "0,1", 3, ("0", "1"), (False, True)],
)  # fmt: skip
def test_what_is_no_interval_is_refused(tiny_pipeline, interval):
    with pytest.raises(RequestError, match=r"^guidance_interval: must be two noise levels"):
        tiny_pipeline.stream("a red car", guidance_interval=interval)
