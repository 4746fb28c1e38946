"""Euler's method on a flow, with and without fresh noise, against closed forms."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gentron.presets import FLOW
from gentron.schedule import NoiseSchedule
from gentron.solvers import solver_table

shifts = pytest.mark.parametrize("shift", [1.0, 3.0])


def flow(shift: float = 1.0) -> NoiseSchedule:
    return NoiseSchedule.from_config({**FLOW, "shift": shift})


@shifts
def test_ddim_on_flow_is_euler_exactly(shift: float) -> None:
    schedule = flow(shift)
    one, other = solver_table("ddim", schedule, 20), solver_table("euler", schedule, 20)
    assert (one.updates == other.updates).all()
    assert (one.timesteps == other.timesteps).all()


def test_eulers_coefficients_are_ddims_formula_on_the_flow_path() -> None:
    """Song et al. 2021, eq. 12, alpha = 1 - sigma: alpha' x0 + sigma' eps with x0 = x - sigma v."""
    table = solver_table("euler", flow(), 20)
    sigma = np.append(np.linspace(1.0, 0.001, 20), 0.0)
    x, v = 0.3, -1.2
    x0, eps = x - sigma[:-1] * v, x + (1.0 - sigma[:-1]) * v
    expected = (1.0 - sigma[1:]) * x0 + sigma[1:] * eps
    ours = table.updates[:, 0] @ np.array([x, 0.0, 0.0, v, 0.0])
    np.testing.assert_allclose(ours, expected, atol=1e-12)


@shifts
@pytest.mark.parametrize("steps", [1, 2, 8, 20])
def test_euler_churn_keeps_the_noise_level_and_only_part_of_noise_that_hides_all(
    steps: int, shift: float
) -> None:
    """Where all data is one point, 0: what is left of the noise, and what comes new."""
    schedule = flow(shift)
    table, plain = (solver_table(name, schedule, steps) for name in ("euler-churn", "euler"))
    assert (table.timesteps == plain.timesteps).all()
    sigma = np.append(schedule.sigmas(table.timesteps), 0.0)
    for s, row in enumerate(table.updates[:, 0]):
        now, then = sigma[s : s + 2]
        kept, fresh = row[0] * now + row[3], row[4]  # the point's velocity is its noise
        assert kept**2 + fresh**2 == pytest.approx(then**2, abs=1e-6)
        if now <= 0.85:
            np.testing.assert_allclose(row, plain.updates[s, 0], atol=1e-9)
        elif then > 0:
            # Ho et al. 2020, eq. 7, for alpha x0 + sigma e scaled to x0 + (sigma / alpha) e.
            share = ((1 - now) / now) / ((1 - then) / then)
            assert kept == pytest.approx(then * share, abs=1e-6)
            assert fresh > 0.2 * then
    assert table.uses_noise.tolist() == [
        bool(now > 0.85 and then > 0) for now, then in pairwise(sigma)
    ]
