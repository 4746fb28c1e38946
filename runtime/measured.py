"""Steps that gentron-bench measured, in the place of computed ones.

A measured step of the asked shape is taken as it is. Of another shape, the time that the roofline
gives is multiplied by what the nearest measured step took beyond its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentron.bundle import Bundle
from gentron.errors import RequestError

FIELD = "measured"
STEP_AXES = ("B", "R", "F", "h", "w")


@dataclass(frozen=True)
class MeasuredStep:
    """One row of a benchmark's result."""

    backend: str
    precision: str
    device: str
    sizes: dict[str, int]
    seconds: float

    def distance(self, sizes: dict[str, int]) -> float:
        """0 for the same shape; how far apart the axes are otherwise, by their ratios."""
        return sum(abs(math.log(self.sizes[axis] / sizes[axis])) for axis in STEP_AXES)


@dataclass(frozen=True)
class Measured:
    """The measured steps of one bundle on one device, by one backend in one precision."""

    steps: tuple[MeasuredStep, ...]
    stages: dict[str, float]  # seconds of the others that were measured: encode, condition, decode
    memory: int  # bytes of the machine; 0 if the result does not say

    @property
    def device(self) -> str:
        return self.steps[0].device

    @property
    def backend(self) -> str:
        return f"{self.steps[0].backend} in {self.steps[0].precision}"

    def check_device(self, gpu: str) -> None:
        """Raises RequestError if this is not of that GPU."""
        plain = self.device.upper().replace(" ", "").replace("-", "")
        if gpu.upper() not in plain:
            raise RequestError(
                FIELD,
                f"measured on {self.device}, which is no {gpu}; leave --gpu out to plan for what "
                "was measured",
            )

    def on_top(self) -> str:
        """What a picture takes beside its steps."""
        known = [f"{name} {seconds * 1e3:.3g} ms" for name, seconds in self.stages.items()]
        return ", ".join(known) or "encoders and decoder"

    def nearest(self, sizes: dict[str, int]) -> MeasuredStep:
        return min(self.steps, key=lambda step: step.distance(sizes))


def read_measured(
    files: tuple[Path, ...],
    bundle: Bundle,
    backend: str | None = None,
    precision: str | None = None,
) -> Measured:
    """Results of `gentron-bench --json` for this bundle's model; the first backend and precision
    that they hold unless one is named.

    Raises RequestError for a file that is none, or of another model, or without a step.
    """
    steps, stages, memory = list[MeasuredStep](), dict[str, float](), 0
    for file in files:
        values = _read(file)
        if values["bundle"] != bundle.manifest.name:
            raise RequestError(
                FIELD,
                f"{file} is of {values['bundle']}, not of {bundle.manifest.name}; run: "
                f"gentron-bench {bundle.path} --json",
            )
        memory = memory or int(values["machine"]["memory_bytes"])
        for row in values["rows"]:
            backend, precision = backend or row["backend"], precision or row["precision"]
            if row["median_s"] is None or (row["backend"], row["precision"]) != (
                backend,
                precision,
            ):
                continue
            if row["stage"] == "step":
                steps.append(_step(row))
            else:
                stages[row["stage"]] = float(row["median_s"])
    if not steps:
        wanted = f" of {backend} in {precision}" if backend else ""
        raise RequestError(FIELD, f"{', '.join(map(str, files))}: holds no step{wanted}")
    if len({step.device for step in steps}) > 1:
        raise RequestError(FIELD, "results of several devices; name files of one")
    return Measured(tuple(steps), stages, memory)


def _step(row: dict[str, Any]) -> MeasuredStep:
    sizes = {axis: int(row["sizes"][axis]) for axis in STEP_AXES}
    return MeasuredStep(
        row["backend"], row["precision"], row["device"], sizes, float(row["median_s"])
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
        rows, machine = values["rows"], values["machine"]
        for row in rows:
            assert {"backend", "precision", "stage", "median_s", "device", "sizes"} <= row.keys()
        assert isinstance(values["bundle"], str)
        assert int(machine["memory_bytes"]) >= 0
    except OSError as error:
        raise RequestError(FIELD, f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise RequestError(
            FIELD, f"{file}: not a result of gentron-bench; make one with gentron-bench --json"
        ) from error
    return dict(values)
