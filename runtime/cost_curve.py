"""What a call takes, as measured: seconds by units of work, for each latent shape."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

MEMORY = 0.1  # of an older measurement that one new one replaces, once there are ten
TRUSTED = 2  # measurements that a size of call needs before it is compared with others
NEAR_BEST = 0.97  # of the best throughput: a larger call gains less than it delays
UNKNOWN = 1.0  # seconds a call, before anything was measured


@dataclass
class _Point:
    seconds: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += max(MEMORY, 1 / self.count) * (seconds - self.seconds)


class CostCurve:
    """Any thread may ask and observe."""

    def __init__(self) -> None:
        self._points: dict[Hashable, dict[float, _Point]] = {}
        self._met: set[tuple[Hashable, float]] = set()
        self._lock = threading.Lock()

    def observe(self, shape: Hashable, units: float, seconds: float) -> None:
        """A call of `units` of work (tokens x frames x rows) took so many seconds. The first of its
        size does not count: something may have been compiled for it."""
        with self._lock:
            if (shape, units) in self._met:
                self._points.setdefault(shape, {}).setdefault(units, _Point()).add(seconds)
            self._met.add((shape, units))

    def seconds(self, shape: Hashable, units: float) -> float:
        """Of a call, by straight lines between what was measured; beyond the largest in proportion
        to it, and for an unknown shape as for a known one."""
        with self._lock:
            points = self._known(shape)
            if not points:
                return UNKNOWN
            sizes = sorted(points)
            if units > sizes[-1]:
                return points[sizes[-1]] * units / sizes[-1]
            return float(np.interp(units, sizes, [points[size] for size in sizes]))

    def per_unit(self, shape: Hashable) -> float:
        """Seconds for a unit of work where calls are as large as pays."""
        with self._lock:
            points = self._known(shape)
            return min((seconds / units for units, seconds in points.items()), default=UNKNOWN)

    def best_units(self, shape: Hashable) -> float:
        """The smallest call that is nearly as good as the best, in units a second; without limit
        while the largest measured is the best, because a larger one may be better still."""
        with self._lock:
            points = self._points.get(shape, {})
            rates = {u: u / p.seconds for u, p in points.items() if p.count >= TRUSTED}
            if not rates or max(rates, key=rates.__getitem__) == max(rates):
                return float("inf")
            best = max(rates.values())
            return min(units for units, rate in rates.items() if rate >= NEAR_BEST * best)

    def _known(self, shape: Hashable) -> dict[float, float]:
        points = self._points.get(shape) or next(iter(self._points.values()), {})
        return {units: point.seconds for units, point in points.items()}
