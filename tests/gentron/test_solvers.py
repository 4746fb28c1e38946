"""Solver tables against diffusers' schedulers, step by step, and against closed forms.

The oracle runs in float64 (`double_precision` below), so that a disagreement is a wrong coefficient
and not rounding; diffusers as shipped, in float32, is compared once per solver on top.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_flow_match_euler_discrete,
    scheduling_unipc_multistep,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gentron.errors import BundleError, RequestError
from gentron.presets import FLOW, LINEAR_EPSILON, PRESETS
from gentron.schedule import NoiseSchedule
from gentron.solvers import SOLVERS, SolverTable, solver_table, solvers_for

# np.array(tensor) inside diffusers, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DDPM, DDIM = scheduling_ddpm.DDPMScheduler, scheduling_ddim.DDIMScheduler
DPM = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler
UNIPC = scheduling_unipc_multistep.UniPCMultistepScheduler
EULER = scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler
MODULES = (
    scheduling_ddpm,
    scheduling_ddim,
    scheduling_dpmsolver_multistep,
    scheduling_unipc_multistep,
    scheduling_flow_match_euler_discrete,
)
CLASSES = {"ddim": DDIM, "ddpm": DDPM, "dpm++2m": DPM, "unipc": UNIPC, "euler": EULER}

SHAPE = (2, 3, 4, 5)
STEP_COUNTS = (1, 2, 3, 5, 7, 20, 50)  # 3 and 7 do not divide 1000
SPACINGS = ("linspace", "leading", "trailing")
# Relative to the largest |x| so far. Both sides do the same float64 arithmetic in another order;
# DDPM's last step in diffusers adds noise of standard deviation 1e-10 (a floor under its log).
DOUBLE_TOLERANCE = 1e-9
# diffusers as shipped: sigmas and samples rounded to float32 (6e-8) and amplified by 1/alpha.
SINGLE_TOLERANCE = 1e-5


class _Double(types.ModuleType):
    """numpy or torch with float32 replaced by float64."""

    def __init__(self, module: types.ModuleType):
        super().__init__(module.__name__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@pytest.fixture
def double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers names float32 in its schedules and updates; make it say float64."""
    for module in MODULES:
        monkeypatch.setattr(module, "torch", _Double(torch))
        if hasattr(module, "np"):
            monkeypatch.setattr(module, "np", _Double(np))


def config(kind: type, **changes: Any) -> dict[str, Any]:
    clip = {"clip_sample": False} if kind in (DDPM, DDIM) else {}
    return {"_class_name": kind.__name__, **clip, **changes}


def schedule_of(kind: type, **changes: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config(config(kind, **changes))


def fake_model(x: np.ndarray, t: float) -> np.ndarray:
    """Nonlinear in x and t, mixes neighbours, of the size of noise."""
    mixed = 0.8 * x - 0.5 * np.roll(x, 1, axis=-1) + 0.3 * np.roll(x, 1, axis=-2)
    return 1.5 * np.tanh(mixed + np.cos(t / 150.0))


def noise_of(step: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1000 + step).standard_normal(shape)


def walk_table(table: SolverTable, model: Callable[[np.ndarray, float], np.ndarray], x: np.ndarray):
    """Latents after every step, by the table's own definition."""
    state = np.zeros((3, *x.shape))
    state[0] = table.initial_scale * x
    for s, t in enumerate(table.timesteps):
        inputs = np.stack([*state, model(state[0], float(t)), noise_of(s, x.shape)])
        state = np.tensordot(table.updates[s], inputs, axes=1)
        yield state[0]


def walk_diffusers(
    scheduler: Any,
    timesteps: np.ndarray,
    x: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    eta: float,
):
    """The same by a diffusers scheduler, shown the table's timesteps (see the flow test)."""
    kind = type(scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    sample = torch.from_numpy(x)
    for s, t in enumerate(timesteps):
        output = torch.from_numpy(fake_model(sample.numpy(), float(t)))
        noise, options = torch.from_numpy(noise_of(s)), {}
        if kind is DDIM:
            options = {"eta": eta, "variance_noise": noise if eta else None}
        if kind is DDPM:
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=noise, **__: z)
        step = scheduler.timesteps[s]
        sample = scheduler.step(output, step, sample, return_dict=False, **options)[0]
        yield sample.numpy()


def worst_error(
    name: str, scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch, eta: float = 0.0
) -> float:
    """Largest difference at any step, relative to the largest |x| up to that step."""
    schedule = NoiseSchedule.from_config(
        {key: list(v) if isinstance(v, tuple) else v for key, v in scheduler.config.items()}
        | {"_class_name": type(scheduler).__name__}
    )
    scheduler.set_timesteps(steps)
    table = solver_table(name, schedule, steps, eta=eta)
    assert len(scheduler.timesteps) == steps
    x = np.random.default_rng(7).standard_normal(SHAPE)
    theirs = walk_diffusers(scheduler, table.timesteps, x, monkeypatch, eta)
    worst, largest = 0.0, 0.0
    for ours, other in zip(walk_table(table, fake_model, x), theirs, strict=True):
        largest = max(largest, float(np.abs(other).max()))
        worst = max(worst, float(np.abs(ours - other).max()) / largest)
    return worst


discrete = pytest.mark.parametrize(
    ("prediction", "spacing"),
    [(p, s) for p in ("epsilon", "v_prediction") for s in SPACINGS],
)
shifts = pytest.mark.parametrize("shift", [1.0, 3.0])


@discrete
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_equals_diffusers(double_precision, monkeypatch, prediction, spacing, eta) -> None:
    for steps in STEP_COUNTS:
        scheduler = DDIM(clip_sample=False, prediction_type=prediction, timestep_spacing=spacing)
        assert worst_error("ddim", scheduler, steps, monkeypatch, eta) < DOUBLE_TOLERANCE


@discrete
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_equals_diffusers_given_the_same_noise(
    double_precision, monkeypatch, prediction, spacing, variance
) -> None:
    for steps in STEP_COUNTS:
        scheduler = DDPM(
            clip_sample=False,
            prediction_type=prediction,
            timestep_spacing=spacing,
            variance_type=variance,
        )
        assert worst_error("ddpm", scheduler, steps, monkeypatch) < DOUBLE_TOLERANCE


@discrete
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_multistep_solvers_equal_diffusers(
    double_precision, monkeypatch, name, prediction, spacing, final
) -> None:
    for steps in STEP_COUNTS:
        scheduler = CLASSES[name](
            prediction_type=prediction, timestep_spacing=spacing, final_sigmas_type=final
        )
        assert worst_error(name, scheduler, steps, monkeypatch) < DOUBLE_TOLERANCE


@shifts
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_multistep_solvers_on_flow_equal_diffusers(
    double_precision, monkeypatch, name, shift
) -> None:
    for steps in STEP_COUNTS:
        scheduler = CLASSES[name](
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        assert worst_error(name, scheduler, steps, monkeypatch) < DOUBLE_TOLERANCE


@shifts
def test_euler_equals_diffusers(double_precision, monkeypatch, shift) -> None:
    for steps in STEP_COUNTS:
        assert worst_error("euler", EULER(shift=shift), steps, monkeypatch) < DOUBLE_TOLERANCE


VARIATIONS: list[tuple[str, dict[str, Any]]] = [
    ("ddim", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ("ddim", {"set_alpha_to_one": False, "steps_offset": 1}),  # Stable Diffusion's
    ("ddim", {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}),
    ("ddim", {"num_train_timesteps": 64}),
    ("ddpm", {"beta_schedule": "squaredcos_cap_v2"}),
    ("dpm++2m", {"steps_offset": 1, "timestep_spacing": "leading"}),
    ("dpm++2m", {"beta_schedule": "squaredcos_cap_v2"}),
    ("dpm++2m", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    ("dpm++2m", {"final_sigmas_type": "sigma_min"}),
    ("dpm++2m", {"lower_order_final": False}),
    ("dpm++2m", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("dpm++2m", {"trained_betas": list(np.geomspace(1e-4, 0.03, 1000))}),
    ("unipc", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("unipc", {"disable_corrector": [0, 1, 5]}),
    ("unipc", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
]


@pytest.mark.parametrize(("name", "changes"), VARIATIONS)
def test_every_other_key_of_the_configuration_has_diffusers_effect(
    double_precision, monkeypatch, name, changes
) -> None:
    clip = {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    for steps in (2, 5, 14, 15, 20):  # DPM-Solver's lower_order_final ends at 14
        scheduler = CLASSES[name](**clip, **changes)
        # The cosine schedule starts at sigma / alpha = 2e4 and amplifies rounding by as much.
        assert worst_error(name, scheduler, steps, monkeypatch) < 10 * DOUBLE_TOLERANCE


AS_SHIPPED: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {"prediction_type": prediction, "timestep_spacing": spacing})
        for name in ("ddim", "ddpm", "dpm++2m", "unipc")
        for prediction in ("epsilon", "v_prediction")
        for spacing in SPACINGS
    ),
    *(
        (name, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift})
        for name in ("dpm++2m", "unipc")
        for shift in (1.0, 3.0)
    ),
    ("euler", {"shift": 1.0}),
    ("euler", {"shift": 3.0}),
]


@pytest.mark.parametrize(("name", "changes"), AS_SHIPPED)
def test_tables_equal_diffusers_as_shipped_within_its_rounding(monkeypatch, name, changes) -> None:
    clip = {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    for steps in (1, 5, 20):
        scheduler = CLASSES[name](**clip, **changes)
        assert worst_error(name, scheduler, steps, monkeypatch) < SINGLE_TOLERANCE


# --- where the steps are ---


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++2m", "unipc"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_equal_diffusers(name, spacing, offset) -> None:
    changes = {"timestep_spacing": spacing, "steps_offset": offset}
    scheduler = CLASSES[name](**changes)
    schedule = schedule_of(CLASSES[name], **changes)
    for steps in (1, 2, 3, 7, 20, 48, 50, 61, 240, 300, 333, 480, 500, 880, 976):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.numpy()
        surplus = theirs[steps:]  # see `_spaced`: a rounding error in diffusers' np.arange
        assert list(surplus) in ([], [-1])
        ours = solver_table(name, schedule, steps).timesteps
        assert ours.tolist() == theirs[:steps].tolist()


@shifts
@pytest.mark.parametrize("name", ["euler", "dpm++2m", "unipc"])
def test_flow_timesteps_equal_diffusers_but_keep_their_fraction(name, shift) -> None:
    if name == "euler":
        scheduler = EULER(shift=shift)
    else:
        scheduler = CLASSES[name](
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    schedule = schedule_of(EULER, shift=shift)
    for steps in (1, 2, 7, 20, 300):
        scheduler.set_timesteps(steps)
        ours = solver_table(name, schedule, steps).timesteps
        sigmas = scheduler.sigmas.numpy()[:-1].astype(np.float64)
        np.testing.assert_allclose(ours, 1000.0 * sigmas, rtol=3e-7)
        theirs = scheduler.timesteps.numpy()
        if name == "euler":
            np.testing.assert_allclose(ours, theirs, rtol=3e-7)
        else:  # these two classes cut to integers; the model was trained on the real line
            assert (np.abs(ours - theirs - 0.5) <= 0.5 + 1e-3).all()


def test_unipc_ends_at_zero_in_first_order_though_the_configuration_says_otherwise() -> None:
    """Order 2 divides by h = infinity there, and diffusers returns NaN."""
    scheduler = UNIPC(lower_order_final=False)
    scheduler.set_timesteps(5)
    sample = torch.ones(SHAPE)
    for t in scheduler.timesteps:
        sample = scheduler.step(0.5 * sample, t, sample).prev_sample
    assert not torch.isfinite(sample).any()
    ours, usual = (
        solver_table("unipc", schedule_of(UNIPC, lower_order_final=lower), 5)
        for lower in (False, True)
    )
    assert (ours.updates == usual.updates).all()


def test_one_configuration_serves_every_solver_with_that_solvers_own_spacing() -> None:
    """As diffusers' `Other.from_config(scheduler.config)`; the numbers are its timesteps."""
    schedule = NoiseSchedule.from_config({**LINEAR_EPSILON, "timestep_spacing": "leading"})
    assert solver_table("dpm++2m", schedule, 20).timesteps[[0, -1]].tolist() == [940, 47]
    assert solver_table("ddim", schedule, 20).timesteps[[0, -1]].tolist() == [950, 0]


# --- closed forms ---


def exact_model(schedule: NoiseSchedule, mean: float, deviation: float):
    """The ideal raw output for data N(mean, deviation^2), independent per element."""

    def model(x: np.ndarray, t: float) -> np.ndarray:
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
    (name, prediction) for name, solver in SOLVERS.items() for prediction in solver.predictions
]


def schedule_for(prediction: str, **changes: Any) -> NoiseSchedule:
    if prediction == "flow_prediction":
        return NoiseSchedule.from_config({**FLOW, "shift": changes.get("shift", 1.0)})
    return NoiseSchedule.from_config(
        {**LINEAR_EPSILON, "prediction_type": prediction} | changes,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_ddim_step_on_a_gaussian_is_the_closed_form(prediction) -> None:
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
    name, prediction, spacing, steps
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
def test_ddpm_with_the_large_variance_keeps_a_standard_normal_standard(prediction, steps) -> None:
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
def test_ddim_keeps_the_noise_level_whatever_eta(name, prediction, eta) -> None:
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
def test_ddim_with_eta_1_is_ddpm_where_their_steps_agree(prediction) -> None:
    schedule = schedule_for(prediction, timestep_spacing="leading")
    one, other = (
        solver_table("ddim", schedule, 50, eta=1.0),
        solver_table("ddpm", schedule, 50),
    )
    np.testing.assert_allclose(one.updates, other.updates, atol=1e-9)


@shifts
def test_ddim_on_flow_is_euler_exactly(shift) -> None:
    schedule = schedule_for("flow_prediction", shift=shift)
    one, other = solver_table("ddim", schedule, 20), solver_table("euler", schedule, 20)
    assert (one.updates == other.updates).all()
    assert (one.timesteps == other.timesteps).all()


def test_eulers_coefficients_are_ddims_formula_on_the_flow_path() -> None:
    """Song et al. 2021, eq. 12, alpha = 1 - sigma: alpha' x0 + sigma' eps with x0 = x - sigma v."""
    table = solver_table("euler", schedule_for("flow_prediction"), 20)
    sigma = np.append(np.linspace(1.0, 0.001, 20), 0.0)
    x, v = 0.3, -1.2
    x0, eps = x - sigma[:-1] * v, x + (1.0 - sigma[:-1]) * v
    expected = (1.0 - sigma[1:]) * x0 + sigma[1:] * eps
    ours = table.updates[:, 0] @ np.array([x, 0.0, 0.0, v, 0.0])
    np.testing.assert_allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_unipc_with_every_correction_disabled_is_dpm_solver_2m(prediction) -> None:
    corrected, bare = (
        schedule_for(prediction, disable_corrector=disabled) for disabled in ([], list(range(20)))
    )
    x = np.random.default_rng(7).standard_normal(SHAPE)

    def end(name: str, schedule: NoiseSchedule) -> np.ndarray:
        return list(walk_table(solver_table(name, schedule, 20), fake_model, x))[-1]

    np.testing.assert_allclose(end("unipc", bare), end("dpm++2m", bare), atol=1e-9)
    assert np.abs(end("unipc", corrected) - end("dpm++2m", corrected)).max() > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])
def test_solvers_of_order_2_beat_order_1_on_the_probability_flow(prediction) -> None:
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
    pair, spacing, steps, eta, cosine, final, lower
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
def test_a_table_in_float32_agrees_with_itself_in_float64(name, prediction) -> None:
    """The denoiser multiplies in float32, from a float32 copy of the updates."""
    table = solver_table(name, schedule_for(prediction), 20)
    x = np.random.default_rng(9).standard_normal(SHAPE)
    state = np.zeros((3, *SHAPE), np.float32)
    state[0] = x
    largest = 0.0
    for s, exact in enumerate(walk_table(table, fake_model, x)):
        prediction_now = fake_model(state[0].astype(np.float64), float(table.timesteps[s]))
        inputs = np.stack([*state, prediction_now, noise_of(s)]).astype(np.float32)
        state = np.tensordot(table.updates[s].astype(np.float32), inputs, axes=1)
        largest = max(largest, float(np.abs(exact).max()))
        assert np.abs(state[0] - exact).max() < SINGLE_TOLERANCE * largest


def test_tables_cannot_be_written_to() -> None:
    table = solver_table("ddim", schedule_for("epsilon"), 4)
    for array in (table.timesteps, table.updates, table.uses_noise):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS.keys())
def test_the_defaults_of_every_preset_have_a_table(spec) -> None:
    schedule = NoiseSchedule.from_config(spec.scheduler)
    table = solver_table(spec.defaults.solver, schedule, spec.defaults.steps)
    assert table.num_steps == spec.defaults.steps


# --- refusals ---


def test_solvers_for_lists_what_a_prediction_type_has() -> None:
    discrete_solvers = ["ddim", "ddpm", "dpm++2m", "unipc"]
    assert solvers_for(schedule_for("epsilon")) == discrete_solvers
    assert solvers_for(schedule_for("v_prediction")) == discrete_solvers
    assert solvers_for(schedule_for("flow_prediction")) == ["ddim", "dpm++2m", "unipc", "euler"]


REFUSED: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("heun", "epsilon", {}, "solver", r"one of ddim, ddpm, dpm\+\+2m, unipc, euler"),
    ("euler", "epsilon", {}, "solver", r"one of ddim, ddpm, dpm\+\+2m, unipc$"),
    ("ddpm", "flow_prediction", {}, "solver", r"one of ddim, dpm\+\+2m, unipc, euler$"),
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
def test_a_wrong_request_is_refused_by_field(name, prediction, options, field, message) -> None:
    arguments = {"steps": 20, **options}
    with pytest.raises(RequestError, match=message) as caught:
        solver_table(name, schedule_for(prediction), **arguments)
    assert caught.value.field == field


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_a_step_count_that_repeats_a_timestep_is_refused(name, spacing) -> None:
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
def test_clipping_is_refused_only_for_the_solvers_that_would_clip(name) -> None:
    schedule = NoiseSchedule.from_config({"_class_name": "DDIMScheduler"})  # absent means true
    assert solvers_for(schedule) == ["dpm++2m", "unipc"]
    with pytest.raises(BundleError, match=r"clip_sample .* set it to false, or .* dpm\+\+2m"):
        solver_table(name, schedule, 20)
    assert solver_table("dpm++2m", schedule, 20).num_steps == 20
