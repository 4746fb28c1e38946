"""The one step of distribution matching distillation against diffusers' DDPMScheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from gentron.errors import BundleError, RequestError
from gentron.schedule import NoiseSchedule
from gentron.solvers import solver_table

PIXART = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def schedule(**config) -> NoiseSchedule:
    return NoiseSchedule.from_config(
        {"_class_name": "DDPMScheduler", **PIXART, "clip_sample": False, **config}
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_step_equals_diffusers_with_timestep_400(prediction) -> None:
    theirs = DDPMScheduler(**PIXART, clip_sample=False, prediction_type=prediction)
    theirs.set_timesteps(timesteps=[400])
    rng = np.random.default_rng(0)
    start, output, noise = rng.standard_normal((3, 2, 5))
    wanted = theirs.step(
        torch.from_numpy(output), 400, torch.from_numpy(start), return_dict=False
    )[0].numpy()  # fmt: skip
    table = solver_table("dmd", schedule(prediction_type=prediction), 1)
    assert table.timesteps.tolist() == [400]
    assert table.initial_scale == 1
    zero = np.zeros_like(start)
    found = np.tensordot(table.updates[0], np.stack([start, zero, zero, output, noise]), 1)
    # diffusers keeps its alphas in float32, and adds noise of 1e-10 where none is meant.
    assert np.abs(found[0] - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert not found[1:].any()
    assert table.uses_noise.tolist() == [False]


def test_other_numbers_of_steps_are_refused() -> None:
    with pytest.raises(RequestError, match="dmd takes one step, got 4; give 1"):
        solver_table("dmd", schedule(), 4)


def test_a_model_with_fewer_timesteps_is_refused() -> None:
    with pytest.raises(RequestError, match="starts at timestep 400 and this model has 100"):
        solver_table("dmd", schedule(num_train_timesteps=100), 1)


def test_clipping_is_refused_and_flow_models_have_none() -> None:
    with pytest.raises(BundleError, match="clip_sample"):
        solver_table("dmd", schedule(clip_sample=True), 1)
    flow = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(RequestError, match="not defined for flow"):
        solver_table("dmd", flow, 1)
