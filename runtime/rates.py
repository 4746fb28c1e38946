"""How often a client may ask: a bucket of tokens each, filled at a steady rate."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MOST = 100_000  # clients remembered; whoever asked longest ago is forgotten, which fills his bucket


@dataclass
class _Bucket:
    tokens: float
    seen: float


class Rates:
    """Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, client: str, per_minute: int) -> float:
        """0 and a token taken, or the seconds until there is one. A client that has been silent
        may ask a quarter of a minute's requests at once."""
        now, rate = self._clock(), per_minute / 60.0
        size = max(1.0, per_minute / 4)
        bucket = self._buckets.setdefault(client, _Bucket(size, now))
        self._buckets.move_to_end(client)
        if len(self._buckets) > MOST:
            self._buckets.popitem(last=False)
        bucket.tokens = min(size, bucket.tokens + (now - bucket.seen) * rate)
        bucket.seen = now
        if bucket.tokens >= 1.0:
            bucket.tokens -= 1.0
            return 0.0
        return (1.0 - bucket.tokens) / rate
