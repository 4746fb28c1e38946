"""Solver tables against diffusers' schedulers, step by step.

The oracle runs in float64 (`double_precision` below), so that a disagreement is a wrong coefficient
and not rounding; diffusers as shipped, in float32, is compared once per solver on top.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
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
from numpy.typing import NDArray

from gentron.schedule import NoiseSchedule
from gentron.solvers import SolverTable, solver_table

Array = NDArray[np.float64]
Model = Callable[[Array, float], Array]
Noise = Callable[[int, tuple[int, ...]], Array]
Walk = Callable[[SolverTable, Model, Array], Iterator[Array]]
WorstError = Callable[..., float]

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


@pytest.fixture
def walk_diffusers(
    monkeypatch: pytest.MonkeyPatch, fake_model: Model, noise_of: Noise
) -> Callable[..., Iterator[Array]]:
    """The same walk by a diffusers scheduler, shown the table's timesteps (see the flow test)."""

    def walk(scheduler: Any, timesteps: Array, x: Array, eta: float) -> Iterator[Array]:
        kind = type(scheduler)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        sample = torch.from_numpy(x)
        for s, t in enumerate(timesteps):
            output = torch.from_numpy(fake_model(sample.numpy(), float(t)))
            noise, options = torch.from_numpy(noise_of(s, SHAPE)), {}
            if kind is DDIM:
                options = {"eta": eta, "variance_noise": noise if eta else None}
            if kind is DDPM:
                monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=noise, **__: z)
            step = scheduler.timesteps[s]
            sample = scheduler.step(output, step, sample, return_dict=False, **options)[0]
            yield sample.numpy()

    return walk


@pytest.fixture
def worst_error(
    walk_table: Walk, walk_diffusers: Callable[..., Iterator[Array]], fake_model: Model
) -> WorstError:
    """Largest difference at any step, relative to the largest |x| up to that step."""

    def error(name: str, scheduler: Any, steps: int, eta: float = 0.0) -> float:
        schedule = NoiseSchedule.from_config(
            {key: list(v) if isinstance(v, tuple) else v for key, v in scheduler.config.items()}
            | {"_class_name": type(scheduler).__name__}
        )
        scheduler.set_timesteps(steps)
        table = solver_table(name, schedule, steps, eta=eta)
        assert len(scheduler.timesteps) == steps
        x = np.random.default_rng(7).standard_normal(SHAPE)
        theirs = walk_diffusers(scheduler, table.timesteps, x, eta)
        worst, largest = 0.0, 0.0
        for ours, other in zip(walk_table(table, fake_model, x), theirs, strict=True):
            largest = max(largest, float(np.abs(other).max()))
            worst = max(worst, float(np.abs(ours - other).max()) / largest)
        return worst

    return error


discrete = pytest.mark.parametrize(
    ("prediction", "spacing"),
    [(p, s) for p in ("epsilon", "v_prediction") for s in SPACINGS],
)
shifts = pytest.mark.parametrize("shift", [1.0, 3.0])


@discrete
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_equals_diffusers(
    double_precision: None, prediction: str, spacing: str, eta: float, worst_error: WorstError
) -> None:
    for steps in STEP_COUNTS:
        scheduler = DDIM(clip_sample=False, prediction_type=prediction, timestep_spacing=spacing)
        assert worst_error("ddim", scheduler, steps, eta) < DOUBLE_TOLERANCE


@discrete
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_equals_diffusers_given_the_same_noise(
    double_precision: None, prediction: str, spacing: str, variance: str, worst_error: WorstError
) -> None:
    for steps in STEP_COUNTS:
        scheduler = DDPM(
            clip_sample=False,
            prediction_type=prediction,
            timestep_spacing=spacing,
            variance_type=variance,
        )
        assert worst_error("ddpm", scheduler, steps) < DOUBLE_TOLERANCE


@discrete
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_multistep_solvers_equal_diffusers(
    double_precision: None,
    name: str,
    prediction: str,
    spacing: str,
    final: str,
    worst_error: WorstError,
) -> None:
    for steps in STEP_COUNTS:
        scheduler = CLASSES[name](
            prediction_type=prediction, timestep_spacing=spacing, final_sigmas_type=final
        )
        assert worst_error(name, scheduler, steps) < DOUBLE_TOLERANCE


@shifts
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_multistep_solvers_on_flow_equal_diffusers(
    double_precision: None, name: str, shift: float, worst_error: WorstError
) -> None:
    for steps in STEP_COUNTS:
        scheduler = CLASSES[name](
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        assert worst_error(name, scheduler, steps) < DOUBLE_TOLERANCE


@shifts
def test_euler_equals_diffusers(
    double_precision: None, shift: float, worst_error: WorstError
) -> None:
    for steps in STEP_COUNTS:
        assert worst_error("euler", EULER(shift=shift), steps) < DOUBLE_TOLERANCE


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
    double_precision: None, name: str, changes: dict[str, Any], worst_error: WorstError
) -> None:
    clip = {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    for steps in (2, 5, 14, 15, 20):  # DPM-Solver's lower_order_final ends at 14
        scheduler = CLASSES[name](**clip, **changes)
        # The cosine schedule starts at sigma / alpha = 2e4 and amplifies rounding by as much.
        assert worst_error(name, scheduler, steps) < 10 * DOUBLE_TOLERANCE


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
def test_tables_equal_diffusers_as_shipped_within_its_rounding(
    name: str, changes: dict[str, Any], worst_error: WorstError
) -> None:
    clip = {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    for steps in (1, 5, 20):
        scheduler = CLASSES[name](**clip, **changes)
        assert worst_error(name, scheduler, steps) < SINGLE_TOLERANCE


# --- where the steps are ---


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++2m", "unipc"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_equal_diffusers(name: str, spacing: str, offset: int) -> None:
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
def test_flow_timesteps_equal_diffusers_but_keep_their_fraction(name: str, shift: float) -> None:
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
