"""What a call takes, as measured: seconds by units of work, for each latent shape."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import numpy as np

MEMORY = 0.1  # of an older measurement that one new one replaces
NEAR_BEST = 0.97  # of the best throughput: a larger call gains less than it delays
UNKNOWN = 1.0  # seconds a call, before anything was measured


class CostCurve:
    """Any thread may ask and observe."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, dict[float, float]] = {}
        self._lock = threading.Lock()

    def observe(self, shape: Hashable, units: float, seconds: float) -> None:
        """A call of `units` of work (tokens x frames x rows) took so many seconds."""
        with self._lock:
            points = self._seconds.setdefault(shape, {})
            before = points.get(units, seconds)
            points[units] = before + MEMORY * (seconds - before)

    def seconds(self, shape: Hashable, units: float) -> float:
        """Of a call, by straight lines between what was measured; beyond the largest in proportion
        to it, and for an unknown shape in proportion to the units of a known one."""
        with self._lock:
            points = self._seconds.get(shape) or self._any()
            if not points:
                return UNKNOWN
            known = sorted(points)
            if units > known[-1]:
                return points[known[-1]] * units / known[-1]
            return float(np.interp(units, known, [points[u] for u in known]))

    def per_unit(self, shape: Hashable) -> float:
        """Seconds for a unit of work where calls are as large as pays."""
        with self._lock:
            points = self._seconds.get(shape) or self._any()
            return min((s / u for u, s in points.items()), default=UNKNOWN)

    def best_units(self, shape: Hashable) -> float:
        """The smallest call that is nearly as good as the best, in units a second; without limit
        before anything was measured."""
        with self._lock:
            points = self._seconds.get(shape)
            if not points:
                return float("inf")
            best = max(units / seconds for units, seconds in points.items())
            if best == _last(points):  # larger ones may be better still
                return float("inf")
            return min(u for u, s in points.items() if u / s >= NEAR_BEST * best)

    def points(self, shape: Hashable) -> dict[float, float]:
        with self._lock:
            return dict(self._seconds.get(shape, {}))

    def _any(self) -> dict[float, float]:
        return next(iter(self._seconds.values()), {})


def _last(points: dict[float, float]) -> float:
    largest = max(points)
    return largest / points[largest]
