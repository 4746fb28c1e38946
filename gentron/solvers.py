"""Solvers as tables: timesteps, and one 3 x 5 matrix per step that updates the sampling state.

All of them are linear in (state, prediction, noise), so a step is

    state'_i = sum_j updates[s, i, j] * (state_0, state_1, state_2, prediction, noise)_j

with the latents in slot 0 and the solver's memory in slots 1 and 2 (zero at the start, and zero
throughout where a solver has none). `prediction` is the network's raw output after guidance; what
it means (noise, v, flow velocity) is absorbed in the coefficients.

Every solver walks the timesteps that its diffusers class walks under the configuration's
`timestep_spacing` and betas, whichever class the configuration is of. So DDIM on a DPM-Solver
configuration is `DDIMScheduler.from_config(config, clip_sample=False)`, given all keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gentron.errors import BundleError, RequestError
from gentron.schedule import Float64Array, NoiseSchedule, Prediction
from gentron.solver_coefficients import (
    NOISE,
    Path,
    ddim,
    ddpm,
    dmd,
    dpm_2m,
    euler,
    euler_churn,
    lcm,
    unipc,
)


@dataclass(frozen=True, eq=False)
class SolverTable:
    """One request's walk from noise to data. Arrays are read-only."""

    name: str
    timesteps: NDArray[np.float32]  # [S], falling, in 0..num_train_timesteps; fractional for flow
    initial_scale: float  # unit noise times this is the first state_0
    updates: Float64Array  # [S, 3, 5]
    uses_noise: NDArray[np.bool_]  # [S]; False means that the noise column is zero

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class Solver:
    """An entry of SOLVERS."""

    summary: str
    predictions: tuple[Prediction, ...]
    build: Callable[..., tuple[Path, Float64Array]]  # of (schedule, steps), and eta if it takes it
    takes_eta: bool = False
    clips: bool = False  # its diffusers class honours clip_sample
    only_steps: int | None = None  # the one number of steps that it is defined for


def solver_table(
    name: str, schedule: NoiseSchedule, steps: int, *, eta: float = 0.0
) -> SolverTable:
    """The table of solver `name`; `eta` in 0..1 scales DDIM's noise (Song et al. 2021, eq. 16).

    Raises RequestError (fields `solver`, `steps`, `eta`), and BundleError where the schedule asks
    for clipping that this solver's class would do.
    """
    solver = _find(name, schedule)
    limit = schedule.num_train_timesteps
    if type(steps) is not int or not 1 <= steps <= limit:
        raise RequestError("steps", f"must be an integer from 1 to {limit}, got {steps!r}")
    _check_eta(name, solver, schedule, eta)
    options = {"eta": float(eta)} if solver.takes_eta else {}
    path, updates = solver.build(schedule, steps, **options)
    timesteps = path.timesteps.astype(np.float32)
    uses_noise = updates[:, 0, NOISE] != 0.0
    for array in (timesteps, updates, uses_noise):
        array.setflags(write=False)
    # Both families start from unit noise: variance preserving, and flow at sigma = 1.
    return SolverTable(name, timesteps, 1.0, updates, uses_noise)


def solvers_for(schedule: NoiseSchedule) -> list[str]:
    """Names of the solvers that can walk this schedule."""
    return [
        name
        for name, solver in SOLVERS.items()
        if schedule.prediction in solver.predictions and not (solver.clips and schedule.clip_sample)
    ]


def _find(name: str, schedule: NoiseSchedule) -> Solver:
    if name not in SOLVERS:
        raise RequestError("solver", f"unknown solver {name!r}; one of {', '.join(SOLVERS)}")
    solver, others = SOLVERS[name], ", ".join(solvers_for(schedule))
    if schedule.prediction not in solver.predictions:
        raise RequestError(
            "solver", f"{name!r} is not defined for {schedule.prediction} models; one of {others}"
        )
    if solver.clips and schedule.clip_sample:
        raise BundleError(
            f"scheduler config: clip_sample is true (the default of its class), and {name} would "
            f"clip every predicted x0; set it to false, or use one of {others}"
        )
    return solver


def _check_eta(name: str, solver: Solver, schedule: NoiseSchedule, eta: float) -> None:
    if type(eta) not in (int, float) or not 0.0 <= eta <= 1.0:
        raise RequestError("eta", f"must be a number from 0 to 1, got {eta!r}")
    if eta and schedule.is_flow:
        raise RequestError(
            "eta",
            f"no solver of a flow model takes it, got {eta}; leave it at 0, or use euler-churn",
        )
    if eta and not solver.takes_eta:
        raise RequestError("eta", f"{name} takes none, got {eta}; leave it at 0, or use ddim")


_VARIANCE_PRESERVING: tuple[Prediction, ...] = ("epsilon", "v_prediction")
_ALL: tuple[Prediction, ...] = (*_VARIANCE_PRESERVING, "flow_prediction")

SOLVERS: dict[str, Solver] = {
    "ddim": Solver("DDIM, eta 0 to 1", _ALL, ddim, takes_eta=True, clips=True),
    "ddpm": Solver("ancestral sampling", _VARIANCE_PRESERVING, ddpm, clips=True),
    "dpm++2m": Solver("DPM-Solver++(2M)", _ALL, dpm_2m),
    "unipc": Solver("UniPC-2, predictor and corrector", _ALL, unipc),
    "lcm": Solver("few steps of a consistency student", _VARIANCE_PRESERVING, lcm, clips=True),
    "dmd": Solver(
        "the one step of a DMD student", _VARIANCE_PRESERVING, dmd, clips=True, only_steps=1
    ),
    "euler": Solver("Euler's method on the flow", ("flow_prediction",), euler),
    "euler-churn": Solver(
        "the same, with fresh noise in the noisiest steps", ("flow_prediction",), euler_churn
    ),
}
