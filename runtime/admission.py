"""Which requests the service takes on: how many wait, how large they are, what can be in time."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from gentron.errors import BusyError, DeadlineError, RequestError
from gentron.runtime.cost_curve import CostCurve
from gentron.runtime.policy import PRIORITIES, Limits
from gentron.runtime.request import Request
from gentron.runtime.work import Needs

WORDS = ("state: this many samples, frames and pixels need {need} bytes",
         "steps: this many need {need} rows of the conditioning tables",
         "prompt: needs {need} texts in the conditioning tables")  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """Of one request, and of all that wait or run."""

    requests: int = 64  # taken on and not finished
    batch: int = 4
    steps: int = 200
    prompt_bytes: int = 4096
    previews: int = 8
    per_client: int = 1 << 30  # of `requests`


@dataclass(frozen=True)
class _Taken:
    client: str
    work: float  # seconds, alone in calls as large as pays
    deadline: float | None


class Admission:
    """Any thread may ask."""

    def __init__(self, bounds: Bounds, limits: Limits, curve: CostCurve):
        self.bounds, self._limits, self._curve = bounds, limits, curve
        self._taken: dict[int, _Taken] = {}
        self._lock = threading.Lock()

    def check(self, request: Request, needs: Needs, previews: int, priority: int) -> None:
        """Raises RequestError for a request that this service never takes."""
        settings, bounds = request.settings, self.bounds
        samples = min(bounds.batch, self._limits.samples)
        for field, value, most in (
            ("n", settings.batch, samples),
            ("steps", settings.steps, bounds.steps),
            ("previews", previews, bounds.previews),
        ):
            if value > most:
                raise RequestError(field, f"at most {most} here, got {value}")
        for field, text in (("prompt", settings.prompt), ("negative", settings.negative)):
            if (size := len(text.encode())) > bounds.prompt_bytes:
                raise RequestError(
                    field, f"at most {bounds.prompt_bytes} bytes here, got {size}; shorten it"
                )
        if priority not in PRIORITIES:
            raise RequestError(
                "priority", f"must be {PRIORITIES[0]} to {PRIORITIES[-1]}, got {priority}"
            )
        for word, need, most in zip(WORDS, needs.memory, self._limits.memory, strict=True):
            if need > most:
                field, _, said = word.format(need=need).partition(": ")
                raise RequestError(field, f"{said}, and this service has {most}; ask for less")

    def take(
        self, number: int, request: Request, needs: Needs, client: str, now: float,
        deadline: float | None,
    ) -> None:  # fmt: skip
        """Counts a request as taken; raises BusyError, DeadlineError."""
        shape, steps = request.shape, request.settings.steps
        work = steps * needs.units * self._curve.per_unit(shape)
        with self._lock:
            own = sum(taken.client == client for taken in self._taken.values())
            if len(self._taken) >= self.bounds.requests or own >= self.bounds.per_client:
                raise BusyError(
                    f"{len(self._taken)} requests are waiting or running, which is the most; try "
                    f"again in {self._until_room():.0f} s", self._until_room()
                )  # fmt: skip
            if deadline is not None:
                self._check_deadline(request, needs, now, deadline)
            self._taken[number] = _Taken(client, work, deadline)

    def give_back(self, number: int) -> None:
        with self._lock:
            self._taken.pop(number, None)

    @property
    def taken(self) -> int:
        with self._lock:
            return len(self._taken)

    def _until_room(self) -> float:
        """Seconds until the first of those under way should have finished, in whole seconds: all
        progress together, so that is when its share of the work is done."""
        work = [taken.work for taken in self._taken.values()]
        return float(max(1, math.ceil(sum(work) / max(1, len(work)))))

    def _check_deadline(self, request: Request, needs: Needs, now: float, deadline: float) -> None:
        """Those with an earlier deadline go first; the rest of the work can wait."""
        alone = request.settings.steps * self._curve.seconds(request.shape, needs.units)
        before = sum(
            taken.work for taken in self._taken.values()
            if taken.deadline is not None and taken.deadline <= deadline
        )  # fmt: skip
        if now + alone + before > deadline:
            raise DeadlineError(
                f"the deadline of {deadline - now:.2f} s cannot be met: it would take about "
                f"{alone + before:.2f} s; allow more time, or ask for fewer steps"
            )
