"""What each way of sharing a GPU does to requests, simulated: no engine runs, only the policy.

    python benchmarks/serving_policies.py [--requests 2000] [--seed 0] [--json FILE]

Requests come at random times (Poisson) at a share of what the GPU could serve, and want 20 to 50
steps each. What a call takes follows published measurements of a 20-billion-parameter model on an
H200 (sgl-project/sglang, pull request 22183): at 512x512 sixteen rows take 5 times as long as one,
at 1024x1024 every row takes as long as the first.

- `one`: one request at a time, in the order of arrival.
- `request`: up to 8 waiting requests form a batch, which runs until its last one is done.
- `step`: `gentron.runtime.policy` as the service runs it, with the units that the curve says pay.
- `step-all`: the same, with every request that is under way in every call.

`first` is the time from arrival to the end of the first step, `total` to the last; p50 and p95.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gentron.runtime.cost_curve import NEAR_BEST
from gentron.runtime.policy import Entry, Limits, Turns, choose

CURVES = {  # requests in a call -> seconds
    "512x512": {1: 0.167, 2: 0.183, 3: 0.186, 4: 0.240, 8: 0.425, 16: 0.832},
    "1024x1024": {1: 0.243, 2: 0.474, 3: 0.711},
}
STEPS = (20, 30, 40, 50)
BATCH, UNDER_WAY = 8, 64


@dataclass(frozen=True)
class Arrival:
    number: int
    at: float
    steps: int


@dataclass
class Times:
    """Of one request, on the simulated clock."""

    first: float = 0.0
    last: float = 0.0


Policy = Callable[[Sequence[Arrival], Callable[[int], float]], dict[int, Times]]


def call_seconds(curve: str) -> Callable[[int], float]:
    """Of a call for so many requests: straight lines between what was measured, and beyond."""
    known = CURVES[curve]
    most = max(known)

    def seconds(count: int) -> float:
        if count > most:
            return known[most] * count / most
        return float(np.interp(count, list(known), list(known.values())))

    return seconds


def best_throughput(seconds: Callable[[int], float]) -> tuple[int, float]:
    """The smallest call that is nearly as good as the best, and the best requests x steps a
    second."""
    rates = {count: count / seconds(count) for count in range(1, 2 * BATCH + 1)}
    best = max(rates.values())
    return min(count for count, rate in rates.items() if rate >= NEAR_BEST * best), best


def arrivals(count: int, rate: float, seed: int) -> list[Arrival]:
    chance, now = random.Random(seed), 0.0
    found = []
    for number in range(count):
        now += chance.expovariate(rate)
        found.append(Arrival(number, now, chance.choice(STEPS)))
    return found


def in_batches(most: int) -> Policy:
    def run(requests: Sequence[Arrival], seconds: Callable[[int], float]) -> dict[int, Times]:
        times, now, waiting = {r.number: Times() for r in requests}, 0.0, list(requests)
        while waiting:
            now = max(now, waiting[0].at)
            batch = [r for r in waiting[:most] if r.at <= now]
            waiting = waiting[len(batch) :]
            for step in range(max(r.steps for r in batch)):
                running = [r for r in batch if r.steps > step]
                now += seconds(len(running))
                for request in running:
                    if step == 0:
                        times[request.number].first = now
                    times[request.number].last = now
            for request in batch:  # results are given out when the batch is done
                times[request.number].last = now
        return times

    return run


def by_step(units: float | None) -> Policy:
    def run(requests: Sequence[Arrival], seconds: Callable[[int], float]) -> dict[int, Times]:
        most = float(best_throughput(seconds)[0]) if units is None else units
        limits = Limits(samples=UNDER_WAY, requests=UNDER_WAY, units=lambda shape: most)
        times, now, turns = {r.number: Times() for r in requests}, 0.0, Turns()
        table: dict[int, Entry] = {}
        coming = iter(requests)
        upcoming = next(coming, None)
        while table or upcoming is not None:
            if not table and upcoming is not None:
                now = max(now, upcoming.at)
            while upcoming is not None and upcoming.at <= now:
                table[upcoming.number] = Entry(
                    id=upcoming.number, client=str(upcoming.number % 4), shape="", samples=1,
                    units=1.0, steps_left=upcoming.steps, arrived=upcoming.at,
                )  # fmt: skip
                upcoming = next(coming, None)
            choice = choose(list(table.values()), turns, limits, now)
            turns = choice.turns
            for number in choice.start:
                table[number] = replace(table[number], started=True, ready=True)
            if not choice.step:
                continue
            now += seconds(len(choice.step))
            for number in choice.step:
                entry = table[number]
                table[number] = replace(
                    entry, steps_left=entry.steps_left - 1, due=choice.due[number]
                )
                times[number].first = times[number].first or now
                if entry.steps_left == 1:
                    times[number].last = now
                    del table[number]
        return times

    return run


POLICIES: dict[str, Policy] = {
    "one": in_batches(1),
    "request": in_batches(BATCH),
    "step": by_step(None),
    "step-all": by_step(float("inf")),
}


def rows(count: int, loads: Sequence[float], seed: int) -> Iterator[dict[str, float | str]]:
    """One for each curve, load and policy. A load of 1 is what the best calls could serve."""
    for curve in CURVES:
        seconds = call_seconds(curve)
        capacity = best_throughput(seconds)[1] / float(np.mean(STEPS))
        for load in loads:
            requests = arrivals(count, load * capacity, seed)
            for name, policy in POLICIES.items():
                times = policy(requests, seconds)
                first = [times[r.number].first - r.at for r in requests]
                total = [times[r.number].last - r.at for r in requests]
                end = max(times[r.number].last for r in requests)
                yield {
                    "curve": curve, "load": load, "policy": name,
                    "per_minute": 60 * count / end,
                    "first_p50": float(np.percentile(first, 50)),
                    "first_p95": float(np.percentile(first, 95)),
                    "total_p50": float(np.percentile(total, 50)),
                    "total_p95": float(np.percentile(total, 95)),
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loads", default="0.5,0.7,0.9,1.1,1.5", help="shares of capacity")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print("curve      load  policy    requests/min  first p50    p95  total p50    p95 (s)")
    found = []
    for row in rows(given.requests, [float(x) for x in given.loads.split(",")], given.seed):
        found.append(row)
        print(
            f"{row['curve']:<10} {row['load']:>4}  {row['policy']:<9} {row['per_minute']:>12.1f}"
            f" {row['first_p50']:>10.2f} {row['first_p95']:>6.2f} {row['total_p50']:>10.1f}"
            f" {row['total_p95']:>6.1f}"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
