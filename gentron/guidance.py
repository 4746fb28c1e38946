"""Classifier-free and motion-free guidance as data: which branches to run, and their weights.

Equation 6, `e(0,0) + lT (e(cT,cM) - e(0,cM)) + lM (e(0,cM) - e(0,0))`, is a weighted sum of
network outputs whose weights sum to 1; a branch of weight 0 is not run at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gentron.errors import RequestError

MAX_SCALE = 3.4e38  # float32

Interval = tuple[float, float]  # of noise levels: guided where low < sigma <= high


class Branch(NamedTuple):
    """One row of the network for a sample."""

    weight: float
    text: bool  # the prompt, or the empty (or negative) text
    motion: bool  # False: identity mask over frames, i.e. independent images


def guidance_branches(guidance: float, motion: float, *, moving: bool) -> tuple[Branch, ...]:
    """Branches of equation 6 for lambda_T = `guidance` and lambda_M = `motion`.

    `moving` is False for an image: one frame is the motion-free case, so lambda_M has no meaning
    and equation 6 is plain classifier-free guidance. Between one and three branches; raises
    RequestError for scales that are not finite numbers.
    """
    for name, value in (("guidance", guidance), ("motion", motion)):
        if not abs(value) <= MAX_SCALE:  # NaN fails this too
            raise RequestError(name, f"must be a finite number (float32), got {value}; try 4.0")
    if not moving:
        motion = 1.0
    branches = (
        Branch(1 - motion, text=False, motion=False),
        Branch(motion - guidance, text=False, motion=True),
        Branch(guidance, text=True, motion=True),
    )
    return tuple(branch for branch in branches if branch.weight != 0)


def unguided_steps(interval: Interval | None, sigmas: Iterable[float]) -> frozenset[int]:
    """Steps of `sigmas` that need no guidance: outside low < sigma <= high, the limited interval
    of Kynkäänniemi et al. 2024 (arXiv 2404.07724, eq. 6). None: every step is guided.

    Sigmas are those of `NoiseSchedule.sigmas`. Raises RequestError for anything but two finite
    numbers with 0 <= low < high.
    """
    if interval is None:
        return frozenset()
    low, high = check_interval(interval)
    return frozenset(i for i, sigma in enumerate(sigmas) if not low < sigma <= high)


def check_interval(interval: object) -> Interval:
    """The interval as two numbers; raises RequestError (field `guidance_interval`)."""
    if isinstance(interval, list | tuple) and len(interval) == 2:
        low, high = interval
        numbers = all(type(end) in (int, float) for end in interval)
        if numbers and 0 <= low < high <= MAX_SCALE:  # NaN fails this too
            return float(low), float(high)
    raise RequestError(
        "guidance_interval",
        f"must be two noise levels, 0 <= LO < HI, got {interval!r}; try (0.3, 5.0), or for a flow "
        "model (0.2, 0.8)",
    )
