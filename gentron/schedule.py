"""The noise that a model was trained with, read from a diffusers scheduler configuration.

Two families: variance preserving, `x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps` over integer
timesteps (DDPM, Ho et al. 2020, eq. 4), and flow, `x = (1 - sigma) x0 + sigma eps` with sigma in
0..1 (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747). Which timesteps are
visited, and by which rule, is the solver's business: `gentron.solvers`.

A configuration may be of any class below, and any solver may be asked of it. A key that is absent
has the default of its class, as in diffusers; one that would change the result and cannot be
honoured is refused by name, and so is one that nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from gentron.errors import BundleError

Prediction = Literal["epsilon", "v_prediction", "flow_prediction"]
Spacing = Literal["linspace", "leading", "trailing"]
Float64Array = NDArray[np.float64]

MAX_TRAIN_TIMESTEPS = 1_000_000  # a table of more is no schedule but a damaged number
NUM_TRAIN_TIMESTEPS = 1000  # DDPM, Ho et al. 2020, section 4; the default of every class below
MAX_COSINE_BETA = 0.999  # Nichol and Dhariwal 2021, arXiv 2102.09672, section 3.2
COSINE_OFFSET = 0.008  # ibid., eq. 17

_PREFIX = "scheduler config:"
_FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
_LCM_CLASS = "LCMScheduler"
_LCM_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SPACING_DEFAULTS: dict[str, Spacing] = {  # `timestep_spacing` where the key is absent
    "DDPMScheduler": "leading",
    "DDIMScheduler": "leading",
    "DPMSolverMultistepScheduler": "linspace",
    "UniPCMultistepScheduler": "linspace",
    _LCM_CLASS: "leading",
    _FLOW_CLASS: "linspace",  # not used: flow has one spacing per solver
}
_CLIPPING_CLASSES = ("DDPMScheduler", "DDIMScheduler")  # here clip_sample is true unless said

# Key -> (values that are the same as absent, what to do about others).
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "thresholding": ((False,), "it clips each sample by its own quantile; set it to false"),
    "use_dynamic_shifting": ((False,), "set it to false and give a fixed shift or flow_shift"),
    "shift_terminal": ((None,), "set it to null"),
    "invert_sigmas": ((False,), "set it to false"),
    "stochastic_sampling": ((False,), "set it to false"),
    "use_karras_sigmas": ((False,), "set it to false; timestep_spacing places the steps"),
    "use_exponential_sigmas": ((False,), "set it to false; timestep_spacing places the steps"),
    "use_beta_sigmas": ((False,), "set it to false; timestep_spacing places the steps"),
    "use_lu_lambdas": ((False,), "set it to false; timestep_spacing places the steps"),
    "rescale_betas_zero_snr": (
        (False,),
        "set it to false, or give the rescaled betas as trained_betas if none of them is 1",
    ),
    "algorithm_type": (("dpmsolver++",), "set it to 'dpmsolver++'"),
    # Each of the two multistep classes of diffusers reads the other's name as its own.
    "solver_type": (("midpoint", "bh2"), "set it to 'midpoint' (DPM-Solver++) or 'bh2' (UniPC)"),
    "solver_order": ((2,), "set it to 2, or ask for the solver ddim, which is of order 1"),
    "predict_x0": ((True,), "set it to true"),
    "solver_p": ((None,), "set it to null"),
}
_READ = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "use_flow_sigmas", "shift", "flow_shift", "timestep_spacing"),
    *("steps_offset", "set_alpha_to_one", "final_sigmas_type", "lower_order_final"),
    *("euler_at_final", "disable_corrector", "variance_type", "clip_sample", "lambda_min_clipped"),
    *("original_inference_steps", "timestep_scaling"),
}
_INERT = {  # without effect unless a refused key is on, or only in classes that are not read here
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "time_shift_type"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
    *("sigma_min", "sigma_max", "skip_prk_steps"),
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """What a solver needs to know; immutable, arrays included."""

    prediction: Prediction  # what the network's raw output means
    num_train_timesteps: int
    alphas_cumprod: Float64Array  # [num_train_timesteps], strictly falling; [0] for flow
    shift: float = 1.0  # flow only: sigma -> shift sigma / (1 + (shift - 1) sigma)
    spacing: Spacing = "linspace"
    steps_offset: int = 0  # added to the timesteps of `leading`
    set_alpha_to_one: bool = True  # DDIM's last alpha-bar: 1, or alphas_cumprod[0]
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"  # where DPM-Solver and UniPC end
    lower_order_final: bool = True
    euler_at_final: bool = False
    lcm_steps: int = 50  # of the teacher that a consistency student was distilled from
    lcm_scaling: float = 10.0  # of timesteps in a consistency student's boundary condition
    disable_corrector: tuple[int, ...] = ()  # UniPC: steps whose result is not corrected
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"  # of DDPM's noise
    # DDPM and DDIM would clip every predicted x0 to -1..1, which no linear update can do. The
    # other solvers' classes have no such option, so they run and only those two are refused.
    clip_sample: bool = False

    @property
    def is_flow(self) -> bool:
        return self.prediction == "flow_prediction"

    def signal_and_noise(self, timesteps: NDArray[Any]) -> tuple[Float64Array, Float64Array]:
        """The two factors of `x = signal * x0 + noise * eps` at timesteps, fractional or not."""
        times = timesteps.astype(np.float64)
        if self.is_flow:
            sigma = times / self.num_train_timesteps
            return 1.0 - sigma, sigma
        bars = np.interp(times, np.arange(self.num_train_timesteps), self.alphas_cumprod)
        return np.sqrt(bars), np.sqrt(1.0 - bars)

    def sigmas(self, timesteps: NDArray[Any]) -> Float64Array:
        """Noise levels as diffusers' schedulers count them: noise over signal, and of a flow the
        share of noise, 0 to 1."""
        signal, noise = self.signal_and_noise(timesteps)
        return noise if self.is_flow else noise / signal

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads the contents of a diffusers `scheduler_config.json`.

        `clip_sample` is true where a DDPM or DDIM configuration does not mention it (diffusers'
        default); the other classes' configurations do not have it, so absent means false there,
        and DDIM on a DPM-Solver configuration is DDIM without clipping.

        Raises BundleError that names the key and says what to change.
        """
        name = config.get("_class_name")
        if not isinstance(name, str) or name not in _SPACING_DEFAULTS:
            known = ", ".join(_SPACING_DEFAULTS)
            raise BundleError(f"{_PREFIX} _class_name {name!r} is not supported; one of {known}")
        _refuse_unsupported(config)
        num = _integer(config, "num_train_timesteps", NUM_TRAIN_TIMESTEPS, at_least=1)
        if num > MAX_TRAIN_TIMESTEPS:
            raise BundleError(
                f"{_PREFIX} num_train_timesteps must be at most {MAX_TRAIN_TIMESTEPS}, got {num}"
            )
        flow = name == _FLOW_CLASS or _flag(config, "use_flow_sigmas", False)
        prediction = _prediction(config, flow, name)
        shift = 1.0
        if flow:
            key = "shift" if name == _FLOW_CLASS else "flow_shift"
            shift = _number(config, key, 1.0)
            if not 0.0 < shift < math.inf:
                raise BundleError(f"{_PREFIX} {key} must be a positive number, got {shift}")
        final = _choice(config, "final_sigmas_type", "zero", ("zero", "sigma_min"))
        if flow and final != "zero":
            raise BundleError(
                f"{_PREFIX} final_sigmas_type {final!r} has no meaning for flow; set it to 'zero'"
            )
        spacings = ("linspace", "leading", "trailing")
        spacing = _choice(config, "timestep_spacing", _SPACING_DEFAULTS[name], spacings)
        alphas_cumprod: Float64Array = np.empty(0)
        if not flow:
            defaults = _LCM_BETAS if name == _LCM_CLASS else {}
            alphas_cumprod = np.multiply.accumulate(1.0 - _betas({**defaults, **config}, num))
            _check_lambda_min(config, alphas_cumprod)
        alphas_cumprod.setflags(write=False)
        return cls(
            prediction=prediction,
            num_train_timesteps=num,
            alphas_cumprod=alphas_cumprod,
            shift=shift,
            spacing=cast(Spacing, spacing),
            steps_offset=_integer(config, "steps_offset", 0, at_least=0),
            set_alpha_to_one=_flag(config, "set_alpha_to_one", True),
            final_sigmas_type=cast(Literal["zero", "sigma_min"], final),
            lower_order_final=_flag(config, "lower_order_final", True),
            euler_at_final=_flag(config, "euler_at_final", False),
            lcm_steps=_lcm_steps(config, num),
            lcm_scaling=_number(config, "timestep_scaling", 10.0),
            disable_corrector=_indices(config, "disable_corrector"),
            variance=_variance(config),
            clip_sample=_flag(config, "clip_sample", name in _CLIPPING_CLASSES),
        )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _ONLY:
            accepted, advice = _ONLY[key]
            if not any(type(value) is type(one) and value == one for one in accepted):
                raise BundleError(f"{_PREFIX} {key} {value!r} is not supported: {advice}")
        elif not key.startswith("_") and key not in _READ and key not in _INERT:
            raise BundleError(f"{_PREFIX} unknown key {key!r}; correct its spelling or remove it")


def _prediction(config: Mapping[str, Any], flow: bool, name: str) -> Prediction:
    default = "flow_prediction" if name == _FLOW_CLASS else "epsilon"
    given = config.get("prediction_type", default)
    if given not in ("epsilon", "v_prediction", "flow_prediction"):
        raise BundleError(
            f"{_PREFIX} prediction_type {given!r} is not supported; "
            "one of epsilon, v_prediction, flow_prediction"
        )
    if flow != (given == "flow_prediction"):
        raise BundleError(
            f"{_PREFIX} prediction_type {given!r} contradicts "
            f"{'a flow schedule' if flow else 'use_flow_sigmas false'}; 'flow_prediction' and "
            f"use_flow_sigmas (or {_FLOW_CLASS}) go together"
        )
    return cast(Prediction, given)


def _betas(config: Mapping[str, Any], num: int) -> Float64Array:
    """[num], each inside 0..1; diffusers has the same values rounded to float32."""
    start, end = _number(config, "beta_start", 0.0001), _number(config, "beta_end", 0.02)
    trained = config.get("trained_betas")
    schedules = ("linear", "scaled_linear", "squaredcos_cap_v2")
    kind = _choice(config, "beta_schedule", "linear", schedules)
    if trained is not None:
        try:
            betas = np.array(trained, dtype=np.float64)
        except (TypeError, ValueError):
            raise BundleError(f"{_PREFIX} trained_betas must be a list of numbers") from None
        if betas.shape != (num,):
            raise BundleError(
                f"{_PREFIX} trained_betas must hold num_train_timesteps ({num}) numbers, "
                f"got shape {list(betas.shape)}"
            )
    elif kind == "linear":
        betas = np.linspace(start, end, num)
    elif kind == "scaled_linear":  # latent diffusion's: linear in sqrt(beta)
        betas = np.linspace(max(start, 0.0) ** 0.5, max(end, 0.0) ** 0.5, num) ** 2
    else:  # Nichol and Dhariwal 2021, eq. 17
        t = np.arange(num + 1) / num
        f = np.cos((t + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * np.pi / 2) ** 2
        betas = np.minimum(1.0 - f[1:] / f[:-1], MAX_COSINE_BETA)
    if not ((betas > 0.0) & (betas < 1.0)).all():
        source = "trained_betas" if trained is not None else "beta_start and beta_end"
        raise BundleError(f"{_PREFIX} {source} must give betas between 0 and 1, both excluded")
    return betas


def _check_lambda_min(config: Mapping[str, Any], alphas_cumprod: Float64Array) -> None:
    """A bound below which no lambda lies cuts nothing; one that would cut steps is refused."""
    if config.get("lambda_min_clipped") is None:
        return
    bound = _number(config, "lambda_min_clipped", -math.inf)
    smallest = 0.5 * math.log(alphas_cumprod[-1] / (1.0 - alphas_cumprod[-1]))
    if bound > smallest:
        raise BundleError(
            f"{_PREFIX} lambda_min_clipped {bound} would cut this schedule, whose smallest lambda "
            f"is {smallest:.4g}; set it to null"
        )


def _variance(config: Mapping[str, Any]) -> Literal["fixed_small", "fixed_large"]:
    given = config.get("variance_type")
    if given in (None, "fixed_small", "fixed_small_log"):  # the log is of the same variance
        return "fixed_small"
    if given == "fixed_large":
        return "fixed_large"
    raise BundleError(
        f"{_PREFIX} variance_type {given!r} is not supported; keep only the channels that predict "
        "the mean and set it to null, 'fixed_small' or 'fixed_large'"
    )


def _lcm_steps(config: Mapping[str, Any], num: int) -> int:
    steps = _integer(config, "original_inference_steps", min(50, num), at_least=1)
    if steps > num:
        raise BundleError(
            f"{_PREFIX} original_inference_steps must be at most num_train_timesteps ({num}), got "
            f"{steps}"
        )
    return steps


def _indices(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    given = config.get(key, ())
    if not isinstance(given, (list, tuple)) or not all(type(i) is int for i in given):
        raise BundleError(f"{_PREFIX} {key} must be a list of step indices, got {given!r}")
    return tuple(given)


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise BundleError(f"{_PREFIX} {key} must be true or false, got {value!r}")
    return value


def _integer(config: Mapping[str, Any], key: str, default: int, *, at_least: int) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < at_least:
        raise BundleError(f"{_PREFIX} {key} must be an integer >= {at_least}, got {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.nan
    if math.isnan(found):
        raise BundleError(f"{_PREFIX} {key} must be a number, got {value!r}")
    return found


def _choice(config: Mapping[str, Any], key: str, default: str, choices: tuple[str, ...]) -> str:
    value = config.get(key, default)
    if value not in choices:
        raise BundleError(
            f"{_PREFIX} {key} {value!r} is not supported; one of {', '.join(choices)}"
        )
    return cast(str, value)
