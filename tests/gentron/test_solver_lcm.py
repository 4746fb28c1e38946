"""The solver of consistency students against diffusers' LCMScheduler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_lcm

from gentron.errors import BundleError, RequestError
from gentron.schedule import NoiseSchedule
from gentron.solvers import solver_table

LCM = scheduling_lcm.LCMScheduler
PIXART = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def fake_model(x: np.ndarray, t: float) -> np.ndarray:
    return np.tanh(0.7 * x + np.sin(t / 90)) + 0.1 * x


def walk_diffusers(
    config: dict[str, Any], steps: int, start: np.ndarray, noise: np.ndarray, monkeypatch: Any
) -> tuple[list[int], np.ndarray]:
    """diffusers' own loop in float64, its noise replaced by ours."""
    drawn = iter(noise)
    monkeypatch.setattr(
        scheduling_lcm, "randn_tensor", lambda *_, **__: torch.from_numpy(next(drawn))
    )
    scheduler = LCM(**config)
    betas = scheduler.betas.double()
    if config.get("beta_schedule") == "linear":
        betas = torch.linspace(
            config["beta_start"], config["beta_end"], len(betas), dtype=torch.float64
        )
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, len(betas), dtype=torch.float64) ** 2
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(start)
    for t in scheduler.timesteps:
        output = torch.from_numpy(fake_model(x.numpy(), float(t)))
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return scheduler.timesteps.tolist(), x.numpy()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
@pytest.mark.parametrize(
    "config",
    [PIXART, {}, PIXART | {"prediction_type": "v_prediction"},
     PIXART | {"original_inference_steps": 60, "timestep_scaling": 3.0}],
)  # fmt: skip
def test_every_step_equals_diffusers(config, steps, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    start, noise = rng.standard_normal((2, 5)), rng.standard_normal((steps, 2, 5))
    times, wanted = walk_diffusers(config, steps, start, noise, monkeypatch)
    schedule = NoiseSchedule.from_config({"_class_name": "LCMScheduler", **config})
    table = solver_table("lcm", schedule, steps)
    assert table.timesteps.tolist() == times
    state = np.stack([start, np.zeros_like(start), np.zeros_like(start)])
    for step, t in enumerate(times):
        terms = np.concatenate([state, fake_model(state[0], t)[None], noise[step][None]])
        state = np.tensordot(table.updates[step], terms, 1)
    assert np.abs(wanted).max() > 0.1
    # diffusers computes the boundary condition from an integer tensor, so in float32.
    assert np.abs(state[0] - wanted).max() < 1e-6 * max(1.0, np.abs(wanted).max())
    assert table.uses_noise.tolist() == [True] * (steps - 1) + [False]


def test_it_walks_any_variance_preserving_schedule() -> None:
    """A LoRA that makes a student leaves the pipeline its old scheduler."""
    schedule = NoiseSchedule.from_config({"_class_name": "DPMSolverMultistepScheduler", **PIXART})
    own = NoiseSchedule.from_config({"_class_name": "LCMScheduler", **PIXART})
    tables = [solver_table("lcm", s, 4) for s in (schedule, own)]
    assert np.array_equal(tables[0].updates, tables[1].updates)
    assert tables[0].timesteps.tolist() == [999, 759, 499, 259]


def test_more_steps_than_the_teacher_had_are_refused() -> None:
    schedule = NoiseSchedule.from_config({"_class_name": "LCMScheduler"})
    with pytest.raises(RequestError, match="lcm takes at most the 50 of its teacher, got 51"):
        solver_table("lcm", schedule, 51)


@pytest.mark.parametrize("steps", [0, 1001, "4"])
def test_a_teacher_of_impossible_length_is_refused(steps) -> None:
    with pytest.raises(BundleError, match="original_inference_steps must be"):
        NoiseSchedule.from_config(
            {"_class_name": "LCMScheduler", "original_inference_steps": steps}
        )
