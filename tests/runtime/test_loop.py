"""The guided loop: rows of anything share a call, and each comes out as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest

from gentron.errors import NonFiniteError
from gentron.guidance import Branch, guidance_branches
from gentron.runtime import Pipeline
from gentron.runtime.loop import DenoiseLoop
from gentron.runtime.sample import Conditioning, pack


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_one_call_holds_any_mix_of_branches_solvers_steps_and_texts(make_sample, run_loop):
    samples = [
        make_sample("ddim", 4, guidance_branches(1.0, 1.0, moving=True), "a cat", 3),
        make_sample("dpm++2m", 6, guidance_branches(7.5, 1.0, moving=True), "a red car", 11),
        make_sample("ddpm", 3, guidance_branches(7.5, 1.3, moving=True), "two birds", 5),
    ]
    assert [len(sample.branches) for sample in samples] == [1, 2, 3]
    loop, together = run_loop(*samples)
    assert loop.calls == 6  # one engine call a step, however many rows
    for index, sample in enumerate(samples):
        alone, latents = run_loop(sample)
        assert alone.calls == sample.steps
        assert relative(together[index], latents[0]) < 1e-3


def test_a_finished_sample_takes_no_rows_and_keeps_its_latents(make_sample, run_loop):
    short = make_sample("ddim", 2, guidance_branches(7.5, 1.3, moving=True), "a cat", 3)
    long = make_sample("ddim", 5, guidance_branches(1.0, 1.0, moving=True), "a dog", 4)
    conditioning = Conditioning([short, long], pooled=True)
    steps = [[(short, s), (long, s)] for s in range(5)]
    assert [len(pack(step, conditioning).row_sample) for step in steps] == [
        4, 4, 1, 1, 1,
    ]  # fmt: skip
    _, together = run_loop(short, long)
    _, alone = run_loop(short)
    assert relative(together[0], alone[0]) < 1e-4


@pytest.mark.parametrize(("text", "motion"), [(7.5, 1.3), (3.0, 1.0), (2.0, 2.0), (0.0, 1.2)])
def test_guidance_is_equation_6(make_sample, run_loop, text, motion):
    """One DDIM step is affine in the prediction and the weights sum to 1, so mixing the branches'
    own next states by equation 6 must give the guided next state."""

    def next_state(*branches):
        return run_loop(make_sample("ddim", 1, branches, "a cat", 9))[1][0].astype(np.float64)

    e_00 = next_state(Branch(1.0, text=False, motion=False))
    e_0m = next_state(Branch(1.0, text=False, motion=True))
    e_tm = next_state(Branch(1.0, text=True, motion=True))
    expected = e_00 + text * (e_tm - e_0m) + motion * (e_0m - e_00)
    guided = next_state(*guidance_branches(text, motion, moving=True))
    assert np.abs(e_0m - e_00).max() > 1e-4  # otherwise the motion scale would be untested
    assert np.abs(e_tm - e_0m).max() > 1e-4
    assert relative(guided, expected) < 1e-5


def test_motion_free_frames_are_independent_images(make_sample, run_loop, video_pipeline):
    branch = (Branch(1.0, text=True, motion=False),)
    sample = make_sample("ddim", 3, branch, "a cat", 21)
    _, frames = run_loop(sample)
    loop = DenoiseLoop(
        video_pipeline.bundle.config, video_pipeline._engines, [sample], (1, 4, 8, 8)
    )
    for _ in loop.run():
        pass
    assert relative(frames[0, :1], loop.latents()[0]) < 1e-4


def test_stochastic_noise_does_not_depend_on_the_batch(make_sample, run_loop):
    branches = guidance_branches(2.0, 1.0, moving=True)
    first = make_sample("ddpm", 5, branches, "a cat", 1)
    second = make_sample("ddim", 5, branches, "a cat", 2, eta=1.0)
    _, together = run_loop(first, second)
    assert relative(together[0], run_loop(first)[1][0]) < 1e-3
    assert relative(together[1], run_loop(second)[1][0]) < 1e-3


def test_distinct_texts_and_steps_are_tabled_once(make_sample):
    branches = guidance_branches(4.0, 1.0, moving=True)
    samples = [make_sample("ddim", 4, branches, "a cat", seed) for seed in range(3)]
    conditioning = Conditioning(samples, pooled=True)
    assert [text.prompt for text in conditioning.texts] == ["", "a cat"]
    assert len(conditioning.modulation) == 2 * 4
    assert len(Conditioning(samples, pooled=False).modulation) == 4


def test_a_non_finite_step_is_named(make_sample, video_pipeline: Pipeline):
    sample = make_sample("ddim", 4, guidance_branches(1.0, 1.0, moving=True), "a cat", 3)
    poisoned = sample.table.updates.copy()
    poisoned[1, 0, 0] = np.nan
    object.__setattr__(sample.table, "updates", poisoned)
    config = video_pipeline.bundle.config
    loop = DenoiseLoop(config, video_pipeline._engines, [sample], (3, 4, 8, 8))
    with pytest.raises(NonFiniteError, match="denoiser, step 2 of 4, sample 0"):
        for _ in loop.run():
            pass
