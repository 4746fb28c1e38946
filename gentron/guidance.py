"""Classifier-free and motion-free guidance as data: which branches to run, and their weights.

Equation 6, `e(0,0) + lT (e(cT,cM) - e(0,cM)) + lM (e(0,cM) - e(0,0))`, is a weighted sum of
network outputs whose weights sum to 1; a branch of weight 0 is not run at all.
"""

from __future__ import annotations

from typing import NamedTuple

from gentron.errors import RequestError

MAX_SCALE = 3.4e38  # float32


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
