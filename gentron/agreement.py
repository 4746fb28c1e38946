"""How close an engine's outputs are to torch's float32, and how close is close enough.

Two users: the export, which writes nothing unless its graphs agree, and the check of a bundle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.contract import Component
from gentron.errors import ParityError
from gentron.probe import ProbeCase

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    max_relative: float  # largest |difference| over largest |reference|
    cosine: float  # at least


# float32: order of summation only, which differs between processors (1.1e-5 to 1.7e-5 seen for one
# encoder). float16 has 11 bits of mantissa, bfloat16 8; both are summed
# over a network's depth. A wrong graph is off by its whole range.
TOLERANCES = {
    "float32": Tolerance(5e-5, 0.999_999_9),
    "float16": Tolerance(2e-2, 0.999_9),
    "bfloat16": Tolerance(1.5e-1, 0.995),
    # Weights of 8 bits, a choice that pictures pay for: refused above 2.5 times what the denoiser
    # of `emoji` loses (1.1 % of the range, cosine 0.9999; bfloat16 0.9 %).
    "int8": Tolerance(3e-2, 0.999_5),
}


@dataclass(frozen=True)
class Agreement:
    """How one output of one case compares with torch's float32; NaN never passes."""

    component: str
    compute: str
    output: str
    sizes: dict[str, int]
    max_absolute: float
    max_relative: float
    cosine: float
    runner: str
    problem: str = ""  # why there are no numbers: the output is absent or of another shape

    @property
    def passed(self) -> bool:
        allowed = TOLERANCES[self.compute]
        close = self.max_relative <= allowed.max_relative and self.cosine >= allowed.cosine
        return close and not self.problem

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: null instead."""
        values = asdict(self) | {"passed": self.passed}
        return {k: None if _is_not_finite(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        what = self.problem or (
            f"differs from torch: {self.max_relative:.2g} of its range (allowed "
            f"{TOLERANCES[self.compute].max_relative:g}), cosine {self.cosine:.6f}"
        )
        return f"{self.component} in {self.compute}: output {self.output} at {self.sizes}: {what}"


def compare(
    component: Component,
    compute: str,
    case: ProbeCase,
    outputs: Mapping[str, Array],
    reference: Mapping[str, Array],
    runner: str,
) -> list[Agreement]:
    """One agreement for each output that torch gave; an output of another shape fails."""
    found = []
    for name, wanted in reference.items():
        problem, numbers = "", (math.nan, math.nan, math.nan)
        if name not in outputs:
            problem = "the engine did not return it"
        elif outputs[name].shape != wanted.shape:
            problem = f"the engine returned shape {outputs[name].shape}, torch {wanted.shape}"
        else:
            numbers = _distance(outputs[name].astype(np.float64), wanted.astype(np.float64))
        found.append(
            Agreement(component.name, compute, name, case.sizes, *numbers, runner, problem)
        )
    return found


def _distance(got: Array, wanted: Array) -> tuple[float, float, float]:
    """Largest difference, the same over the largest reference value, and the cosine."""
    with np.errstate(invalid="ignore"):  # inf - inf and 0 * inf: the NaN that comes fails
        difference, scale = float(np.abs(got - wanted).max()), float(np.abs(wanted).max())
        norms = float(np.linalg.norm(got) * np.linalg.norm(wanted))
        cosine = float((got * wanted).sum()) / norms if norms else float(difference == 0)
    return difference, difference / scale if scale else difference, cosine


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def require(agreements: Sequence[Agreement]) -> None:
    """The gate of the export: raises ParityError with the worst output."""
    failed = [a for a in agreements if not a.passed]
    if failed:
        worst = max(
            failed, key=lambda a: math.inf if math.isnan(a.max_relative) else a.max_relative
        )
        raise ParityError(f"{worst}; no bundle was made of it")
