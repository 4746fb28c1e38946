"""Non-finite values stop a run where they appear, by name, instead of becoming a black picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.errors import NonFiniteError


def check_finite(values: npt.NDArray[Any], component: str) -> None:
    if np.isfinite(values).all():
        return
    raise NonFiniteError(non_finite_message(component))


def non_finite_message(component: str) -> str:
    return (
        f"{component} produced NaN or infinity, so there is no picture; the weights are damaged "
        "(gentron-run info BUNDLE checks them) or this precision is too narrow for them: "
        "try --precision fp32"
    )
