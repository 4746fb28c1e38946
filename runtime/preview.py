"""The picture that a step is heading for, from the two states around it and no extra network call.

A step is linear, so the guided prediction can be solved for; the clean latents follow from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.contract import STATE_SLOTS
from gentron.schedule import NoiseSchedule
from gentron.solvers import SolverTable


def predicted_clean(
    schedule: NoiseSchedule,
    table: SolverTable,
    step: int,
    before: npt.NDArray[np.float32],
    after: npt.NDArray[np.float32],
    noise: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float32]:
    """Clean latents [F, C, h, w] as predicted in `step`, from states [3, F, C, h, w]."""
    update = table.updates[step]
    # A row in which the prediction takes part: slot 0 of every solver but a stepless corrector.
    slot = int(np.argmax(np.abs(update[:, STATE_SLOTS]) > 0))
    known = np.tensordot(update[slot, :STATE_SLOTS], before, axes=1)
    if noise is not None:
        known = known + update[slot, STATE_SLOTS + 1] * noise
    prediction = (after[slot] - known) / update[slot, STATE_SLOTS]
    clean = _clean(schedule, before[0], prediction, float(table.timesteps[step]))
    return np.ascontiguousarray(clean, dtype=np.float32)


def _clean(
    schedule: NoiseSchedule, x: npt.NDArray[Any], prediction: npt.NDArray[Any], timestep: float
) -> npt.NDArray[Any]:
    """x0 from a noisy x and the network's output there, by what that output means."""
    alpha, sigma = map(float, schedule.signal_and_noise(np.asarray(timestep)))
    if schedule.is_flow:
        return x - sigma * prediction
    if schedule.prediction == "v_prediction":
        return alpha * x - sigma * prediction
    return (x - sigma * prediction) / alpha
