"""Solver tables against closed forms, what the denoiser relies on, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gentron.config import ModelSpec
from gentron.errors import BundleError, RequestError
from gentron.presets import FLOW, LINEAR_EPSILON, PRESETS
from gentron.schedule import NoiseSchedule
from gentron.solvers import SOLVERS, SolverTable, solver_table, solvers_for

Array = NDArray[np.float64]
Model = Callable[[Array, float], Array]
Noise = Callable[[int, tuple[int, ...]], Array]
Walk = Callable[[SolverTable, Model, Array], Iterator[Array]]

SHAPE = (2, 3, 4, 5)
SPACINGS = ("linspace", "leading", "trailing")
# The denoiser's float32: sigmas and samples rounded (6e-8) and amplified by 1/alpha.
SINGLE_TOLERANCE = 1e-5


# --- closed forms ---


def exact_model(schedule: NoiseSchedule, mean: float, deviation: float) -> Model:
    """The ideal raw output for data N(mean, deviation^2), independent per element."""

    def model(x: Array, t: float) -> Array:
        alpha, sigma = path_at(schedule, t)
        variance = (alpha * deviation) ** 2 + sigma**2
        noise = sigma * (x - alpha * mean) / variance
        data = mean + alpha * deviation**2 * (x - alpha * mean) / variance
        return {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * data,
            "flow_prediction": noise - data,
        }[schedule.prediction]

    return model


def path_at(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    if schedule.is_flow:
        sigma = t / schedule.num_train_timesteps
        return 1.0 - sigma, sigma
    bar = schedule.alphas_cumprod[round(t)]
    return float(np.sqrt(bar)), float(np.sqrt(1.0 - bar))


PAIRS = [
    (name, prediction)
    for name, solver in SOLVERS.items()
    if solver.only_steps is None
    for prediction in solver.predictions
]


def schedule_for(prediction: str, **changes: Any) -> NoiseSchedule:
    if prediction == "flow_prediction":
        return NoiseSchedule.from_config(FLOW)
    return NoiseSchedule.from_config(
        {**LINEAR_EPSILON, "prediction_type": prediction} | changes,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_ddim_step_on_a_gaussian_is_the_closed_form(prediction: str, walk_table: Walk) -> None:
    """From t = 999 to data: x' = E[x0 | x], the posterior mean of a Gaussian."""
    mean, deviation = 0.7, 0.5
    schedule = schedule_for(prediction, timestep_spacing="trailing")
    x = np.random.default_rng(3).standard_normal(SHAPE)
    table = solver_table("ddim", schedule, 1)
    (ours,) = walk_table(table, exact_model(schedule, mean, deviation), x)
    bar = np.prod(1.0 - np.linspace(0.0001, 0.02, 1000))
    gain = np.sqrt(bar) * deviation**2 / (bar * deviation**2 + 1.0 - bar)
    np.testing.assert_allclose(ours, mean + gain * (x - np.sqrt(bar) * mean), rtol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("name", "prediction"), PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_where_all_data_is_one_point_every_step_stays_on_the_path(
    name: str, prediction: str, spacing: str, steps: int, walk_table: Walk
) -> None:
    """x = alpha point + sigma e with one e throughout, for every solver without noise of its own.

    DDIM's steps reach t - 1000 // S, so only its end is compared; DDPM adds other noise.
    """
    schedule = schedule_for(prediction, timestep_spacing=spacing)
    table = solver_table(name, schedule, steps)
    point = 0.7
    e = np.random.default_rng(5).standard_normal(SHAPE)
    alpha, sigma = path_at(schedule, float(table.timesteps[0]))
    walked = list(walk_table(table, exact_model(schedule, point, 0.0), alpha * point + sigma * e))
    np.testing.assert_allclose(walked[-1], point, rtol=1e-6)
    if name in ("dpm++2m", "unipc", "euler"):
        for x, t in zip(walked, table.timesteps[1:], strict=False):
            alpha, sigma = path_at(schedule, float(t))
            # flow: t is float32, and 1e-7 of sigma = 1 is what rounding it moves x by
            np.testing.assert_allclose(x, alpha * point + sigma * e, atol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 333])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm_with_the_large_variance_keeps_a_standard_normal_standard(
    prediction: str, steps: int
) -> None:
    """Ho et al. 2020, section 3.2: beta is the exact variance for N(0, 1) data."""
    schedule = schedule_for(prediction, variance_type="fixed_large", timestep_spacing="linspace")
    table = solver_table("ddpm", schedule, steps)
    model = exact_model(schedule, 0.0, 1.0)
    for s, t in enumerate(table.timesteps[:-1]):
        from_state, _, _, from_prediction, from_noise = table.updates[s, 0]
        slope = from_state + from_prediction * model(np.ones(1), float(t))[0]
        assert slope**2 + from_noise**2 == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("name", "prediction"), [("ddim", "epsilon"), ("ddim", "v_prediction")])
def test_ddim_keeps_the_noise_level_whatever_eta(name: str, prediction: str, eta: float) -> None:
    """Song et al. 2021, lemma 1: the marginals do not depend on sigma_t. Data is one point, 0."""
    schedule = schedule_for(prediction, timestep_spacing="leading")
    table = solver_table(name, schedule, 20, eta=eta)
    model = exact_model(schedule, 0.0, 0.0)
    levels = [path_at(schedule, float(t))[1] for t in table.timesteps] + [0.0]
    for s, t in enumerate(table.timesteps):
        from_state, _, _, from_prediction, from_noise = table.updates[s, 0]
        slope = from_state + from_prediction * model(np.ones(1), float(t))[0]
        after = (slope * levels[s]) ** 2 + from_noise**2
        assert after == pytest.approx(levels[s + 1] ** 2, abs=1e-12)
    assert table.uses_noise.tolist() == [eta > 0] * 19 + [False]


def test_ddpm_over_all_timesteps_is_the_papers_equation_2() -> None:
    table = solver_table("ddpm", schedule_for("epsilon"), 1000)
    beta = np.linspace(0.0001, 0.02, 1000)
    bar = np.cumprod(1.0 - beta)
    t = table.timesteps.astype(int)
    assert t.tolist() == list(range(999, -1, -1))
    in_state, in_prediction = table.updates[:, 0, 0], table.updates[:, 0, 3]
    np.testing.assert_allclose(in_state, 1.0 / np.sqrt(1.0 - beta[t]), rtol=1e-10)
    expected = -beta[t] / (np.sqrt(1.0 - beta[t]) * np.sqrt(1.0 - bar[t]))
    np.testing.assert_allclose(in_prediction, expected, rtol=1e-9)
    assert table.uses_noise.tolist() == [True] * 999 + [False]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_with_eta_1_is_ddpm_where_their_steps_agree(prediction: str) -> None:
    schedule = schedule_for(prediction, timestep_spacing="leading")
    one, other = (
        solver_table("ddim", schedule, 50, eta=1.0),
        solver_table("ddpm", schedule, 50),
    )
    np.testing.assert_allclose(one.updates, other.updates, atol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_unipc_with_every_correction_disabled_is_dpm_solver_2m(
    prediction: str, walk_table: Walk, fake_model: Model
) -> None:
    corrected, bare = (
        schedule_for(prediction, disable_corrector=disabled) for disabled in ([], list(range(20)))
    )
    x = np.random.default_rng(7).standard_normal(SHAPE)

    def end(name: str, schedule: NoiseSchedule) -> Array:
        return list(walk_table(solver_table(name, schedule, 20), fake_model, x))[-1]

    np.testing.assert_allclose(end("unipc", bare), end("dpm++2m", bare), atol=1e-9)
    assert np.abs(end("unipc", corrected) - end("dpm++2m", corrected)).max() > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])
def test_solvers_of_order_2_beat_order_1_on_the_probability_flow(
    prediction: str, walk_table: Walk
) -> None:
    """For Gaussian data the ODE's solution is known: x standardised stays what it is."""
    mean, deviation, steps = 0.7, 0.5, 160
    schedule = schedule_for(prediction)
    x = np.full((1, 1, 1, 1), 1.3)

    def error(name: str, steps: int) -> float:
        table = solver_table(name, schedule, steps)
        alpha, sigma = path_at(schedule, float(table.timesteps[0]))
        spread = np.hypot(alpha * deviation, sigma)
        exact = mean + deviation * (x - alpha * mean) / spread
        walked = list(walk_table(table, exact_model(schedule, mean, deviation), x))
        return float(np.abs(walked[-1] - exact).max())

    assert error("ddim", steps) < 0.02
    assert 1.5 < error("ddim", steps // 2) / error("ddim", steps) < 2.5
    for name in ("dpm++2m", "unipc"):
        assert error(name, steps) < error("ddim", steps) / 10


# --- what the denoiser relies on ---


def test_one_configuration_serves_every_solver_with_that_solvers_own_spacing() -> None:
    """As diffusers' `Other.from_config(scheduler.config)`; the numbers are its timesteps."""
    schedule = NoiseSchedule.from_config({**LINEAR_EPSILON, "timestep_spacing": "leading"})
    assert solver_table("dpm++2m", schedule, 20).timesteps[[0, -1]].tolist() == [940, 47]
    assert solver_table("ddim", schedule, 20).timesteps[[0, -1]].tolist() == [950, 0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pair=st.sampled_from(PAIRS),
    spacing=st.sampled_from(SPACINGS),
    steps=st.integers(1, 1000),
    eta=st.sampled_from([0.0, 0.5, 1.0]),
    cosine=st.booleans(),
    final=st.sampled_from(["zero", "sigma_min"]),
    lower=st.booleans(),
)
def test_every_table_is_finite_falls_and_ends_without_memory(
    pair: tuple[str, str],
    spacing: str,
    steps: int,
    eta: float,
    cosine: bool,
    final: str,
    lower: bool,
) -> None:
    name, prediction = pair
    schedule = schedule_for(
        prediction,
        timestep_spacing=spacing,
        beta_schedule="squaredcos_cap_v2" if cosine else "linear",
        final_sigmas_type=final,
        lower_order_final=lower,
    )
    if name != "ddim" or schedule.is_flow:
        eta = 0.0
    if name in ("dpm++2m", "unipc") and steps == 1000 and spacing != "trailing":
        return  # refused: test_a_step_count_that_repeats_a_timestep_is_refused
    if name == "lcm":
        steps = min(steps, schedule.lcm_steps)  # more are refused: test_solver_lcm.py
    table = solver_table(name, schedule, steps, eta=eta)
    assert table.timesteps.dtype == np.float32
    assert table.updates.dtype == np.float64
    assert table.timesteps.shape == (steps,)
    assert table.updates.shape == (steps, 3, 5)
    assert np.isfinite(table.updates).all()
    assert (np.diff(table.timesteps) < 0).all()
    assert table.timesteps.min() >= 0.0
    assert table.timesteps.max() <= 1000.0
    assert not table.updates[-1, 1:].any()
    unwritten = [slot for slot in (1, 2) if not table.updates[:, slot].any()]
    assert not table.updates[:, :, unwritten].any()
    assert not table.updates[:, 1:, 4].any()
    assert (table.uses_noise == (table.updates[:, 0, 4] != 0)).all()
    assert table.initial_scale == 1.0


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_a_table_in_float32_agrees_with_itself_in_float64(
    name: str, prediction: str, walk_table: Walk, fake_model: Model, noise_of: Noise
) -> None:
    """The denoiser multiplies in float32, from a float32 copy of the updates."""
    table = solver_table(name, schedule_for(prediction), 20)
    x = np.random.default_rng(9).standard_normal(SHAPE)
    state = np.zeros((3, *SHAPE), np.float32)
    state[0] = x
    largest = 0.0
    for s, exact in enumerate(walk_table(table, fake_model, x)):
        prediction_now = fake_model(state[0].astype(np.float64), float(table.timesteps[s]))
        inputs = np.stack([*state, prediction_now, noise_of(s, SHAPE)]).astype(np.float32)
        state = np.tensordot(table.updates[s].astype(np.float32), inputs, axes=1)
        largest = max(largest, float(np.abs(exact).max()))
        assert np.abs(state[0] - exact).max() < SINGLE_TOLERANCE * largest


def test_tables_cannot_be_written_to() -> None:
    table = solver_table("ddim", schedule_for("epsilon"), 4)
    for array in (table.timesteps, table.updates, table.uses_noise):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS.keys())
def test_the_defaults_of_every_preset_have_a_table(spec: ModelSpec) -> None:
    schedule = NoiseSchedule.from_config(spec.scheduler)
    table = solver_table(spec.defaults.solver, schedule, spec.defaults.steps)
    assert table.num_steps == spec.defaults.steps


# --- refusals ---


def test_solvers_for_lists_what_a_prediction_type_has() -> None:
    discrete_solvers = ["ddim", "ddpm", "dpm++2m", "unipc", "lcm", "dmd"]
    assert solvers_for(schedule_for("epsilon")) == discrete_solvers
    assert solvers_for(schedule_for("v_prediction")) == discrete_solvers
    assert solvers_for(schedule_for("flow_prediction")) == [
        "ddim", "dpm++2m", "unipc", "euler", "euler-churn"
    ]  # fmt: skip


REFUSED: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("heun", "epsilon", {}, "solver", r"one of ddim, ddpm, .*, lcm, dmd, euler, euler-churn$"),
    ("euler", "epsilon", {}, "solver", r"one of ddim, ddpm, dpm\+\+2m, unipc, lcm, dmd$"),
    ("ddpm", "flow_prediction", {}, "solver", r"one of ddim, .*, unipc, euler, euler-churn$"),
    ("ddim", "epsilon", {"steps": 0}, "steps", "from 1 to 1000, got 0"),
    ("ddim", "epsilon", {"steps": -3}, "steps", "from 1 to 1000, got -3"),
    ("euler", "flow_prediction", {"steps": 1001}, "steps", "from 1 to 1000, got 1001"),
    ("ddim", "epsilon", {"steps": 20.0}, "steps", "must be an integer"),
    ("ddim", "epsilon", {"steps": True}, "steps", "must be an integer"),
    ("ddim", "epsilon", {"steps": "20"}, "steps", "must be an integer"),
    ("ddim", "epsilon", {"eta": 1.5}, "eta", "from 0 to 1, got 1.5"),
    ("ddim", "epsilon", {"eta": -0.1}, "eta", "from 0 to 1, got -0.1"),
    ("ddim", "epsilon", {"eta": float("nan")}, "eta", "from 0 to 1, got nan"),
    ("ddim", "epsilon", {"eta": "1"}, "eta", "from 0 to 1"),
    ("unipc", "epsilon", {"eta": 0.5}, "eta", "leave it at 0, or use ddim"),
    ("ddpm", "epsilon", {"eta": 1.0}, "eta", "leave it at 0, or use ddim"),
    ("ddim", "flow_prediction", {"eta": 0.5}, "eta", "no solver of a flow model.*leave it at 0"),
]


@pytest.mark.parametrize(("name", "prediction", "options", "field", "message"), REFUSED)
def test_a_wrong_request_is_refused_by_field(
    name: str, prediction: str, options: dict[str, Any], field: str, message: str
) -> None:
    arguments = {"steps": 20, **options}
    with pytest.raises(RequestError, match=message) as caught:
        solver_table(name, schedule_for(prediction), **arguments)
    assert caught.value.field == field


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_a_step_count_that_repeats_a_timestep_is_refused(name: str, spacing: str) -> None:
    """diffusers returns NaN there."""
    schedule = schedule_for("epsilon", timestep_spacing=spacing)
    assert np.isfinite(solver_table(name, schedule, 999).updates).all()
    with pytest.raises(RequestError, match=r"steps: 1000 steps repeat .*use fewer"):
        solver_table(name, schedule, 1000)


def test_an_offset_past_the_last_timestep_is_refused() -> None:
    schedule = schedule_for("epsilon", timestep_spacing="leading", steps_offset=1)
    assert solver_table("ddim", schedule, 999).timesteps[0] == 999
    with pytest.raises(RequestError, match="1000 steps with steps_offset 1 start at t = 1000"):
        solver_table("ddim", schedule, 1000)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_clipping_is_refused_only_for_the_solvers_that_would_clip(name: str) -> None:
    schedule = NoiseSchedule.from_config({"_class_name": "DDIMScheduler"})  # absent means true
    assert solvers_for(schedule) == ["dpm++2m", "unipc"]
    with pytest.raises(BundleError, match=r"clip_sample .* set it to false, or .* dpm\+\+2m"):
        solver_table(name, schedule, 20)
    assert solver_table("dpm++2m", schedule, 20).num_steps == 20
