"""What a contender has to be able to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


class Runner(ABC):
    """A contender, loaded and ready. `facts` go into its rows: label, precision, versions."""

    facts: dict[str, Any]

    @abstractmethod
    def run(self) -> float | None:
        """The work, once, with its results on the host. Returns seconds if only a part of it is to
        count."""

    def outputs(self) -> dict[str, Array]:
        """Of the last run, by `number of the call.tensor`; empty if there is nothing to compare."""
        return {}

    def close(self) -> None:  # noqa: B027  most hold nothing but memory
        """Ends what it started."""
