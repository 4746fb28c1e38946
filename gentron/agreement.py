"""How close an engine's outputs are to torch's float32, and how close is close enough."""

from __future__ import annotations

from collections.abc import Sequence
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


# float32: order of summation only. float16 has 11 bits of mantissa, bfloat16 8; both are summed
# over a network's depth. A wrong graph is off by its whole range.
TOLERANCES = {
    "float32": Tolerance(2e-5, 0.999_999_9),
    "float16": Tolerance(2e-2, 0.999_9),
    "bfloat16": Tolerance(1.5e-1, 0.995),
}


@dataclass(frozen=True)
class Agreement:
    """How one output of one case compares with torch's float32."""

    component: str
    compute: str
    output: str
    sizes: dict[str, int]
    max_absolute: float
    max_relative: float
    cosine: float
    runner: str

    @property
    def passed(self) -> bool:
        allowed = TOLERANCES[self.compute]
        return self.max_relative <= allowed.max_relative and self.cosine >= allowed.cosine

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def compare(
    component: Component,
    compute: str,
    case: ProbeCase,
    outputs: dict[str, Array],
    reference: dict[str, Array],
    runner: str,
) -> list[Agreement]:
    found = []
    for name, wanted in reference.items():
        got, ref = outputs[name].astype(np.float64), wanted.astype(np.float64)
        assert got.shape == ref.shape, (component.name, name, got.shape, ref.shape)
        difference, scale = np.abs(got - ref).max(), np.abs(ref).max()
        norms = np.linalg.norm(got) * np.linalg.norm(ref)
        found.append(
            Agreement(
                component.name,
                compute,
                name,
                case.sizes,
                float(difference),
                float(difference / scale) if scale else float(difference),
                float((got * ref).sum() / norms) if norms else float(difference == 0),
                runner,
            )
        )
    return found


def require(agreements: Sequence[Agreement]) -> None:
    """Raises ParityError with the worst output; NaN never passes."""
    failed = [a for a in agreements if not a.passed]
    if failed:
        worst = max(failed, key=lambda a: a.max_relative if a.max_relative == a.max_relative else 9)
        raise ParityError(
            f"{worst.component} in {worst.compute}: output {worst.output} at {worst.sizes} differs "
            f"from torch: {worst.max_relative:.2g} of its range (allowed "
            f"{TOLERANCES[worst.compute].max_relative:g}), cosine {worst.cosine:.6f}; "
            "nothing was written"
        )
