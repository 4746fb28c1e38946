"""Reading diffusers' scheduler configurations: values against diffusers, refusals by name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from gentron.errors import BundleError
from gentron.presets import FLOW, LINEAR_EPSILON
from gentron.schedule import NoiseSchedule

DISCRETE = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)


def schedule(**changes: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config({**LINEAR_EPSILON, **changes})


@pytest.mark.parametrize(
    ("changes", "rounding"),
    [
        # 1000 products of float32 numbers near 1: a random walk in steps of 6e-8.
        ({}, 5e-6),
        ({"beta_start": 0.001, "beta_end": 0.03}, 5e-6),
        ({"num_train_timesteps": 50}, 1e-6),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, 5e-6),
        ({"trained_betas": list(np.geomspace(1e-4, 0.05, 1000))}, 5e-6),
        # The last factor is 1 - 0.999 in float32, which has four digits.
        ({"beta_schedule": "squaredcos_cap_v2"}, 2e-4),
    ],
)
def test_alphas_cumprod_is_diffusers_without_its_float32_rounding(changes, rounding) -> None:
    ours = schedule(**changes).alphas_cumprod
    theirs = DDPMScheduler(**changes).alphas_cumprod.numpy()
    assert ours.dtype == np.float64
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=rounding)


def test_the_linear_schedule_ends_where_the_product_says() -> None:
    bar = schedule().alphas_cumprod
    assert bar[0] == 1.0 - 0.0001
    assert math.log(bar[-1]) == pytest.approx(
        sum(math.log1p(-(0.0001 + 0.0199 * i / 999)) for i in range(1000)), rel=1e-12
    )


def test_the_cosine_schedule_is_a_squared_cosine_until_its_cap() -> None:
    bar = schedule(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    t = np.arange(1, 1000) / 1000
    angle = (t + 0.008) / 1.008 * math.pi / 2
    expected = (np.cos(angle) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    np.testing.assert_allclose(bar[:-1], expected, rtol=1e-9)
    assert bar[-1] / bar[-2] == pytest.approx(0.001)


@pytest.mark.parametrize("kind", DISCRETE)
def test_absent_keys_have_their_classes_defaults(kind) -> None:
    """Oracle: the configuration that diffusers itself fills in."""
    full = dict(kind().config)
    read = NoiseSchedule.from_config({"_class_name": kind.__name__})
    assert read.prediction == full["prediction_type"]
    assert read.num_train_timesteps == full["num_train_timesteps"]
    assert read.spacing == full["timestep_spacing"]
    assert read.steps_offset == full["steps_offset"]
    assert read.clip_sample == full.get("clip_sample", False)
    assert read.set_alpha_to_one == full.get("set_alpha_to_one", True)
    assert read.final_sigmas_type == full.get("final_sigmas_type", "zero")
    assert read.lower_order_final == full.get("lower_order_final", True)
    assert read.euler_at_final == full.get("euler_at_final", False)
    assert list(read.disable_corrector) == list(full.get("disable_corrector", []))
    np.testing.assert_allclose(read.alphas_cumprod, kind().alphas_cumprod.numpy(), rtol=5e-6)


@pytest.mark.parametrize("kind", [*DISCRETE, FlowMatchEulerDiscreteScheduler])
def test_what_diffusers_saves_is_read(kind, tmp_path) -> None:
    kind().save_config(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    read = NoiseSchedule.from_config(saved)
    assert read.is_flow == (kind is FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_is_read_from_either_kind_of_configuration(kind) -> None:
    by_keys = NoiseSchedule.from_config(
        {
            "_class_name": kind.__name__,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        }
    )
    by_class = NoiseSchedule.from_config({**FLOW, "shift": 3.0})
    for read in (by_keys, by_class):
        assert read.is_flow
        assert read.prediction == "flow_prediction"
        assert read.shift == 3.0
        assert read.num_train_timesteps == 1000
        assert read.alphas_cumprod.size == 0


def test_a_configuration_carried_over_from_another_class_is_read() -> None:
    """diffusers keeps the keys of the class that a configuration came from."""
    other = DPMSolverMultistepScheduler(timestep_spacing="trailing", euler_at_final=True)
    scheduler = DDIMScheduler.from_config(other.config, clip_sample=False)
    assert scheduler.config.euler_at_final  # not a key of DDIM's own
    read = NoiseSchedule.from_config({**scheduler.config, "_class_name": "DDIMScheduler"})
    assert (read.spacing, read.euler_at_final, read.clip_sample) == ("trailing", True, False)


def test_clip_sample_is_read_as_the_class_would() -> None:
    assert NoiseSchedule.from_config({"_class_name": "DDPMScheduler"}).clip_sample
    assert NoiseSchedule.from_config({"_class_name": "DDIMScheduler"}).clip_sample
    assert not schedule().clip_sample
    assert schedule(clip_sample=True).clip_sample
    assert not NoiseSchedule.from_config(
        {"_class_name": "DDIMScheduler", "clip_sample": False}
    ).clip_sample


def test_a_lambda_bound_that_cuts_nothing_is_accepted() -> None:
    smallest = float(DPMSolverMultistepScheduler().lambda_t.min())
    for bound in (None, -math.inf, smallest - 0.01):
        assert schedule(lambda_min_clipped=bound).num_train_timesteps == 1000
    with pytest.raises(BundleError, match=r"lambda_min_clipped .* set it to null"):
        schedule(lambda_min_clipped=smallest + 0.01)


def test_nothing_of_a_schedule_can_be_changed() -> None:
    read = schedule()
    with pytest.raises(AttributeError):
        read.shift = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        read.alphas_cumprod[0] = 0.5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "PNDMScheduler"}, "_class_name 'PNDMScheduler' .*one of DDPMScheduler"),
    ({"_class_name": None}, "_class_name None is not supported"),
    ({"thresholding": True}, "thresholding True .* set it to false"),
    ({"use_dynamic_shifting": True}, "use_dynamic_shifting True .* fixed shift"),
    ({"shift_terminal": 0.1}, "shift_terminal 0.1 .* null"),
    ({"invert_sigmas": True}, "invert_sigmas True .* false"),
    ({"stochastic_sampling": True}, "stochastic_sampling True .* false"),
    ({"use_karras_sigmas": True}, "use_karras_sigmas True .* false"),
    ({"use_exponential_sigmas": True}, "use_exponential_sigmas True .* false"),
    ({"use_beta_sigmas": True}, "use_beta_sigmas True .* false"),
    ({"use_lu_lambdas": True}, "use_lu_lambdas True .* false"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True .* false"),
    ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type 'sde-dpmsolver.*' .* 'dpmsolver"),
    ({"algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver' .* 'dpmsolver"),
    ({"solver_type": "heun"}, "solver_type 'heun' .* 'midpoint'"),
    ({"solver_type": "bh1"}, "solver_type 'bh1' .* 'bh2'"),
    ({"solver_order": 3}, "solver_order 3 .* set it to 2"),
    ({"predict_x0": False}, "predict_x0 False .* true"),
    ({"variance_type": "learned_range"}, "variance_type 'learned_range' .* channels"),
    ({"variance_type": "learned"}, "variance_type 'learned' .* channels"),
    ({"variance_type": "fixed_large_log"}, "variance_type 'fixed_large_log'"),
    ({"prediction_type": "sample"}, "prediction_type 'sample' .* one of epsilon"),
    ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' contradicts"),
    ({"use_flow_sigmas": True}, "prediction_type 'epsilon' contradicts a flow schedule"),
    ({**FLOW, "prediction_type": "epsilon"}, "prediction_type 'epsilon' contradicts"),
    ({**FLOW, "prediction_type": "flow_prediction", "shift": 0.0}, "shift must be a positive"),
    (
        {**FLOW, "prediction_type": "flow_prediction", "final_sigmas_type": "sigma_min"},
        "final_sigmas_type 'sigma_min' has no meaning for flow",
    ),
    ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' .* one of linear"),
    ({"timestep_spacing": "log"}, "timestep_spacing 'log' .* one of linspace, leading, trailing"),
    ({"final_sigmas_type": "one"}, "final_sigmas_type 'one' .* one of zero"),
    ({"timestep_spacin": "leading"}, "unknown key 'timestep_spacin'"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps must be an integer >= 1, got '1000'"),
    ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer >= 1, got 0"),
    ({"steps_offset": None}, "steps_offset must be an integer >= 0, got None"),
    ({"steps_offset": True}, "steps_offset must be an integer >= 0, got True"),
    ({"lower_order_final": 1}, "lower_order_final must be true or false, got 1"),
    ({"beta_start": "0.1"}, "beta_start must be a number"),
    ({"beta_end": 1.0}, "beta_start and beta_end must give betas between 0 and 1"),
    ({"beta_start": -0.1}, "beta_start and beta_end must give betas between 0 and 1"),
    ({"trained_betas": [0.1, 0.2]}, r"trained_betas must hold .* \(1000\) numbers"),
    ({"trained_betas": "betas.npy"}, "trained_betas must be a list of numbers"),
    ({"trained_betas": [1.0] * 1000}, "trained_betas must give betas between 0 and 1"),
    ({"disable_corrector": [0, "1"]}, "disable_corrector must be a list of step indices"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(changes, message) -> None:
    with pytest.raises(BundleError, match=f"^scheduler config: {message}"):
        schedule(**changes)


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_noise_levels_are_those_of_diffusers(kind) -> None:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = kind(**betas)
    levels = schedule(**betas).sigmas(np.array([999, 500, 21, 0]))
    bars = theirs.alphas_cumprod.numpy().astype(np.float64)[[999, 500, 21, 0]]
    np.testing.assert_allclose(levels, ((1 - bars) / bars) ** 0.5, rtol=1e-4)


def test_noise_levels_of_a_flow_are_shares_of_noise() -> None:
    flow = NoiseSchedule.from_config(FLOW)
    assert np.array_equal(flow.sigmas(np.array([1000.0, 250.0])), [1.0, 0.25])
