"""The coefficients behind `gentron.solvers`: one function per solver, pure numpy, float64.

Each takes (schedule, steps), DDIM eta too, and returns the walk and its updates [S, 3, 5]. The
arguments have been checked by `gentron.solvers`, which says what an update is.

Notation: `x = alpha x0 + sigma eps` on the path, `lambda = ln(alpha / sigma)`, `m` is the data
prediction, primes are at the next step, `h = lambda' - lambda`, `r = h_previous / h`, and
`P = alpha' (1 - e^-h) = alpha' - alpha sigma' / sigma`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gentron.errors import RequestError
from gentron.schedule import Float64Array, NoiseSchedule

NUM_SLOTS = 3  # of the state
PREDICTION, NOISE = NUM_SLOTS, NUM_SLOTS + 1  # columns of an update, after the slots
NUM_INPUTS = NUM_SLOTS + 2

# UniPC on flow starts this far below sigma = 1, where lambda is infinite (as in diffusers 0.42).
FLOW_START_MARGIN = 1e-6
# With fewer steps than this, `lower_order_final` ends 2M with a first-order step (as in diffusers).
FEW_STEPS = 15
DMD_TIMESTEP = 400  # PixArt-alpha's DMD checkpoints
CHURNED = 0.85  # the noise level above which "euler-churn" replaces noise
LCM_SIGMA_DATA = 0.5  # Luo et al. 2023, arXiv 2310.04378, and diffusers


class Path(NamedTuple):
    """Where the walk stands at each step, and where it ends."""

    timesteps: Float64Array  # [S]
    alpha: Float64Array  # [S + 1]
    sigma: Float64Array  # [S + 1]


# --- where the steps are ---


def _spaced(schedule: NoiseSchedule, steps: int, *, surplus: int) -> NDArray[np.int64]:
    """[S] integer timesteps, falling.

    `surplus` is 0 for DDPM and DDIM; it is 1 for DPM-Solver and UniPC, which place one point more
    under `linspace` and `leading`, and drop the one at t = 0.
    """
    num, points = schedule.num_train_timesteps, steps + surplus
    t: Float64Array
    if schedule.spacing == "linspace":
        t = np.linspace(0, num - 1, points).round()[::-1][:steps]
    elif schedule.spacing == "leading":
        t = (np.arange(points, dtype=np.float64) * (num // points))[::-1][:steps]
        t = t + schedule.steps_offset
    else:
        # np.arange as in diffusers, so that halves round alike. For some counts (61 is the
        # first) it is one element too long there and the walk ends at t = -1: cut here.
        t = np.arange(num, 0, -num / steps).round()[:steps] - 1
    if t[0] >= num:
        raise RequestError(
            "steps",
            f"{steps} steps with steps_offset {schedule.steps_offset} start at t = {int(t[0])}, "
            f"past the last trained one ({num - 1}); use fewer",
        )
    return t.astype(np.int64)


def _integer_path(schedule: NoiseSchedule, t: NDArray[np.int64], last: float) -> Path:
    """The walk over timesteps t that ends at alpha-bar `last`."""
    alpha_bar = np.append(schedule.alphas_cumprod[t], last)
    return Path(t.astype(np.float64), np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar))


def _flow_path(schedule: NoiseSchedule, sigma: Float64Array) -> Path:
    """sigma [S], already shifted; the walk ends at 0."""
    sigma = np.append(sigma, 0.0)
    return Path(sigma[:-1] * schedule.num_train_timesteps, 1.0 - sigma, sigma)


def _shifted(schedule: NoiseSchedule, sigma: Float64Array) -> Float64Array:
    """Esser et al. 2024, arXiv 2403.03206, eq. 23."""
    return schedule.shift * sigma / (1.0 + (schedule.shift - 1.0) * sigma)


def _multistep_path(
    schedule: NoiseSchedule, steps: int, flow_sigma: Callable[[NoiseSchedule, int], Float64Array]
) -> Path:
    if schedule.is_flow:
        return _flow_path(schedule, flow_sigma(schedule, steps))
    t = _spaced(schedule, steps, surplus=1)
    if (np.diff(t) >= 0).any():  # lambda would not advance, and 1 / r be infinite
        raise RequestError(
            "steps", f"{steps} steps repeat a timestep under {schedule.spacing}; use fewer"
        )
    to_zero = schedule.final_sigmas_type == "zero"
    return _integer_path(schedule, t, 1.0 if to_zero else float(schedule.alphas_cumprod[0]))


def _dpm_flow_sigma(schedule: NoiseSchedule, steps: int) -> Float64Array:
    """From 1 - 1/num_train_timesteps, shifted, towards 0."""
    return _shifted(schedule, np.linspace(1 - 1 / schedule.num_train_timesteps, 0, steps + 1)[:-1])


def _unipc_flow_sigma(schedule: NoiseSchedule, steps: int) -> Float64Array:
    """From 1 less a margin, shifted, towards 1/num_train_timesteps."""
    sigma = _shifted(schedule, np.linspace(1, 1 / schedule.num_train_timesteps, steps + 1)[:-1])
    sigma[0] -= FLOW_START_MARGIN
    return sigma


# --- what a step does; a row is [S, 5], coefficients of (state_0..2, prediction, noise) ---


def _unit_rows(num: int, column: int) -> Float64Array:
    rows = np.zeros((num, NUM_INPUTS))
    rows[:, column] = 1.0
    return rows


def _data_rows(schedule: NoiseSchedule, alpha: Float64Array, sigma: Float64Array) -> Float64Array:
    """m as a row of (state_0, prediction)."""
    rows = np.zeros((len(alpha), NUM_INPUTS))
    if schedule.prediction == "epsilon":  # Ho et al. 2020, eq. 15
        rows[:, 0], rows[:, PREDICTION] = 1.0 / alpha, -sigma / alpha
    elif schedule.prediction == "v_prediction":  # Salimans and Ho 2022, arXiv 2202.00512, section 4
        rows[:, 0], rows[:, PREDICTION] = alpha, -sigma
    else:  # v = eps - x0, hence x = x0 + sigma v
        rows[:, 0], rows[:, PREDICTION] = 1.0, -sigma
    return rows


def _mix(*terms: tuple[Float64Array, Float64Array]) -> Float64Array:
    """Sum of weight [S] times row [S, 5]."""
    total = np.zeros_like(terms[0][1])
    for weight, row in terms:
        total += weight[:, None] * row
    return total


def _memoryless(latents: Float64Array) -> Float64Array:
    updates = np.zeros((len(latents), NUM_SLOTS, NUM_INPUTS))
    updates[:, 0] = latents
    return updates


def _renoised(
    schedule: NoiseSchedule,
    alpha: Float64Array,
    sigma: Float64Array,
    next_alpha: Float64Array,
    kept: Float64Array,
    fresh: Float64Array,
) -> Float64Array:
    """`alpha' m + kept eps + fresh noise` with eps = (x - alpha m) / sigma: DDIM's eq. 12 (Song et
    al. 2021, arXiv 2010.02502)."""
    return _mix(
        (kept / sigma, _unit_rows(len(alpha), 0)),
        (next_alpha - kept * alpha / sigma, _data_rows(schedule, alpha, sigma)),
        (fresh, _unit_rows(len(alpha), NOISE)),
    )


def euler(schedule: NoiseSchedule, steps: int) -> tuple[Path, Float64Array]:
    """x' = x + (sigma' - sigma) v, over FlowMatchEulerDiscreteScheduler's steps.

    Its smallest sigma passes through the shift twice: once as the end of the trained range and
    once with all the others. That is what diffusers does, and it matters for shift != 1 alone.
    """
    ends = np.array([1.0, 1.0 / schedule.num_train_timesteps])
    largest, smallest = _shifted(schedule, ends)
    path = _flow_path(schedule, _shifted(schedule, np.linspace(largest, smallest, steps)))
    rows = _unit_rows(steps, 0)
    rows[:, PREDICTION] = np.diff(path.sigma)
    return path, _memoryless(rows)


def euler_churn(schedule: NoiseSchedule, steps: int) -> tuple[Path, Float64Array]:
    """Euler's steps, whose noise is replaced by fresh noise while there is little but noise.

    What a picture shows is settled in the first steps, from noise that a network may misread and
    never gets rid of. So above sigma = `CHURNED` a step keeps no more of it than DDPM's posterior
    does (DDIM's eq. 16 at eta = 1, which needs nothing but alpha / sigma). Below, it is Euler's.
    Karras et al. 2022, arXiv 2206.00364, algorithm 2, add noise in a range of levels alone as well.
    """
    path, _ = euler(schedule, steps)
    alpha, sigma = path.alpha[:-1], path.sigma[:-1]
    next_alpha, next_sigma = path.alpha[1:], path.sigma[1:]
    # (alpha sigma' / (sigma alpha'))^2 is what of the noise's variance a step keeps.
    posterior = alpha * next_sigma / (sigma * next_alpha)
    kept = next_sigma * np.where(sigma > CHURNED, posterior, 1.0)
    fresh = np.sqrt(np.maximum(next_sigma**2 - kept**2, 0.0))
    return path, _memoryless(_renoised(schedule, alpha, sigma, next_alpha, kept, fresh))


def ddim(schedule: NoiseSchedule, steps: int, eta: float = 0.0) -> tuple[Path, Float64Array]:
    """Song et al. 2021, arXiv 2010.02502, eqs. 12 and 16; for flow it is Euler's method.

    As in diffusers, a step goes from t to t - num_train_timesteps // S whatever the spacing, so
    under `linspace`, and where S does not divide the range, the level that a step reaches is not
    the one at which the next is evaluated (huggingface/diffusers, thread 11347).
    """
    if schedule.is_flow:
        return euler(schedule, steps)
    t = _spaced(schedule, steps, surplus=0)
    last = 1.0 if schedule.set_alpha_to_one else float(schedule.alphas_cumprod[0])
    path = _integer_path(schedule, t, last)
    alpha, sigma = path.alpha[:-1], path.sigma[:-1]
    reached = t - schedule.num_train_timesteps // steps
    next_bar = np.where(reached >= 0, schedule.alphas_cumprod[np.maximum(reached, 0)], last)
    next_alpha, next_variance = np.sqrt(next_bar), 1.0 - next_bar
    variance = eta**2 * next_variance / sigma**2 * (1.0 - alpha**2 / next_bar)  # eq. 16
    kept = np.sqrt(np.maximum(next_variance - variance, 0.0))  # of the direction to x
    fresh = np.sqrt(np.maximum(variance, 0.0))
    return path, _memoryless(_renoised(schedule, alpha, sigma, next_alpha, kept, fresh))


def ddpm(schedule: NoiseSchedule, steps: int) -> tuple[Path, Float64Array]:
    """Ho et al. 2020, arXiv 2006.11239, eq. 7 with strides; on one-step strides GenTron's eq. 2."""
    t = _spaced(schedule, steps, surplus=0)
    path = _integer_path(schedule, t, 1.0)
    alpha, sigma = path.alpha[:-1], path.sigma[:-1]
    next_alpha, next_variance = path.alpha[1:], path.sigma[1:] ** 2
    step_alpha = (alpha / next_alpha) ** 2
    variance = 1.0 - step_alpha  # beta: exact for N(0, 1) data (ibid., section 3.2)
    if schedule.variance == "fixed_small":  # beta-tilde: exact for a single point
        variance = variance * next_variance / sigma**2
    noise = np.where(t > 0, np.sqrt(variance), 0.0)  # diffusers asks for t, not for the last step
    latents = _mix(
        (np.sqrt(step_alpha) * next_variance / sigma**2, _unit_rows(steps, 0)),
        (next_alpha * (1.0 - step_alpha) / sigma**2, _data_rows(schedule, alpha, sigma)),
        (noise, _unit_rows(steps, NOISE)),
    )
    return path, _memoryless(latents)


def lcm(schedule: NoiseSchedule, steps: int) -> tuple[Path, Float64Array]:
    """Multistep consistency sampling, Luo et al. 2023, arXiv 2310.04378, algorithm 3.

    The network's x0 passes the boundary condition of consistency models (Song et al. 2023, arXiv
    2303.01469, section 3) and is noised anew to the next timestep; the last step adds no noise. The
    timesteps are some of the teacher's `lcm_steps` (diffusers' class LCMScheduler).
    """
    teacher = schedule.lcm_steps
    if steps > teacher:
        raise RequestError(
            "steps", f"lcm takes at most the {teacher} of its teacher, got {steps}; try 4"
        )
    stride = schedule.num_train_timesteps // teacher
    chosen = np.floor(np.linspace(0, teacher, steps, endpoint=False)).astype(np.int64)
    t = ((np.arange(teacher, dtype=np.int64) + 1) * stride - 1)[::-1][chosen]
    path = _integer_path(schedule, t, 1.0)
    scaled = t * schedule.lcm_scaling
    skip = LCM_SIGMA_DATA**2 / (scaled**2 + LCM_SIGMA_DATA**2)
    out = scaled / np.sqrt(scaled**2 + LCM_SIGMA_DATA**2)
    latents = _mix(
        (path.alpha[1:] * skip, _unit_rows(steps, 0)),
        (path.alpha[1:] * out, _data_rows(schedule, path.alpha[:-1], path.sigma[:-1])),
        (path.sigma[1:], _unit_rows(steps, NOISE)),
    )
    return path, _memoryless(latents)


def dmd(schedule: NoiseSchedule, steps: int) -> tuple[Path, Float64Array]:
    """Distribution matching distillation, Yin et al. 2024, arXiv 2311.18828, eq. 1: one step from
    unit noise to the network's x0. PixArt's student was trained to make it from t = 400 (diffusers'
    class DDPMScheduler with timesteps=[400])."""
    if steps != 1:
        raise RequestError("steps", f"dmd takes one step, got {steps}; give 1, or use lcm")
    if schedule.num_train_timesteps <= DMD_TIMESTEP:
        raise RequestError(
            "solver",
            f"dmd starts at timestep {DMD_TIMESTEP} and this model has "
            f"{schedule.num_train_timesteps}; use another solver",
        )
    path = _integer_path(schedule, np.array([DMD_TIMESTEP]), 1.0)
    return path, _memoryless(_data_rows(schedule, path.alpha[:-1], path.sigma[:-1]))


class _Multistep(NamedTuple):
    """What 2M and UniPC share; all [S]."""

    decay: Float64Array  # sigma' / sigma
    gain: Float64Array  # P
    step: Float64Array  # h; infinite at the end if sigma' = 0
    ratio: Float64Array  # r; 0 in the first step, where there is no h_previous
    second_order: NDArray[np.bool_]  # False: the step is first order, which is DDIM's


def _multistep(path: Path, second_order: NDArray[np.bool_]) -> _Multistep:
    alpha, sigma = path.alpha, path.sigma
    decay = sigma[1:] / sigma[:-1]
    ratio = np.zeros(len(decay))
    with np.errstate(divide="ignore"):  # sigma' = 0 or h = 0, in the last step alone
        step = np.diff(np.log(alpha) - np.log(sigma))
        np.divide(step[:-1], step[1:], out=ratio[1:], where=second_order[1:])
    return _Multistep(decay, alpha[1:] - alpha[:-1] * decay, step, ratio, second_order)


def _predictor(
    walk: _Multistep, latents: Float64Array, data: Float64Array, previous: Float64Array
) -> Float64Array:
    """Lu et al. 2022, arXiv 2211.01095, algorithm 2 (midpoint); UniPC-2's predictor is the same."""
    extra = np.zeros_like(walk.gain)
    np.divide(walk.gain, 2.0 * walk.ratio, out=extra, where=walk.second_order)
    return _mix((walk.decay, latents), (walk.gain + extra, data), (-extra, previous))


def dpm_2m(schedule: NoiseSchedule, steps: int) -> tuple[Path, Float64Array]:
    """DPM-Solver++(2M), Lu et al. 2022. Slot 1 holds the previous m."""
    path = _multistep_path(schedule, steps, _dpm_flow_sigma)
    second_order = np.arange(steps) > 0
    if (
        schedule.final_sigmas_type == "zero"
        or schedule.euler_at_final
        or (schedule.lower_order_final and steps < FEW_STEPS)
    ):
        second_order[-1] = False
    walk = _multistep(path, second_order)
    data = _data_rows(schedule, path.alpha[:-1], path.sigma[:-1])
    updates = _memoryless(_predictor(walk, _unit_rows(steps, 0), data, _unit_rows(steps, 1)))
    updates[:-1, 1] = data[:-1]
    return path, updates


def unipc(schedule: NoiseSchedule, steps: int) -> tuple[Path, Float64Array]:
    """UniPC-2 of Zhao et al. 2023, arXiv 2302.04867, on data predictions (diffusers' "bh2").

    One evaluation serves both halves of a step: m at the predicted x first corrects x, then feeds
    the next prediction. Slot 0 is the predicted x, slot 1 the part of its correction that is known
    beforehand (z; corrected x = z + k m), slot 2 the previous m.
    """
    path = _multistep_path(schedule, steps, _unipc_flow_sigma)
    second_order = np.arange(steps) > 0
    if schedule.lower_order_final or path.sigma[-1] == 0.0:  # order 2 has no limit at sigma' = 0
        second_order[-1] = False
    walk = _multistep(path, second_order)
    weight_previous, weight_new = _corrector_weights(walk)
    data = _data_rows(schedule, path.alpha[:-1], path.sigma[:-1])
    corrected = _unit_rows(steps, 0)
    corrects = ~np.isin(np.arange(steps - 1), schedule.disable_corrector)  # the result of step s
    k = (walk.gain * weight_new)[:-1]
    fixed = _mix((np.ones(steps - 1), _unit_rows(steps - 1, 1)), (k, data[1:]))
    corrected[1:] = np.where(corrects[:, None], fixed, corrected[1:])
    previous = _unit_rows(steps, 2)
    updates = _memoryless(_predictor(walk, corrected, data, previous))
    known = _mix(
        (walk.decay, corrected),
        (walk.gain * (1.0 - weight_new - weight_previous), data),
        (walk.gain * weight_previous, previous),
    )
    updates[:-1, 1], updates[:-1, 2] = known[:-1], data[:-1]  # the last step leaves no memory
    return path, updates


def _corrector_weights(walk: _Multistep) -> tuple[Float64Array, Float64Array]:
    """[S] each: weights of m_previous - m and of m_new - m in the correction of step s's result.

    Order 1: 0 and 1/2. Order 2 solves the 2 x 2 system of Zhao et al. 2023, theorem 3.1, with
    B(h) = e^-h - 1 and nodes -r (m_previous) and 1 (m_new). The last result is never corrected.
    """
    weight_previous, weight_new = np.zeros_like(walk.gain), np.full_like(walk.gain, 0.5)
    second = np.flatnonzero(walk.second_order[:-1])
    minus_h, r = -walk.step[second], walk.ratio[second]
    first = np.expm1(minus_h)
    phi_2 = first / minus_h - 1.0
    phi_3 = phi_2 / minus_h - 0.5
    b_1, b_2 = phi_2 / first, 2.0 * phi_3 / first
    rho = (b_1 - b_2) / (1.0 + r)  # rho + weight_new = b_1, -r rho + weight_new = b_2
    weight_previous[second], weight_new[second] = -rho / r, b_1 - rho
    return weight_previous, weight_new
