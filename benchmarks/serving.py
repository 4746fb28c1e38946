"""Requests at random times on a real bundle: by step, by batches of requests, one at a time.

    python benchmarks/serving.py [BUNDLE] [--backend NAME] [--requests 60] [--size 64x64]
                                 [--loads 0.5,0.7,0.9,1.1,1.5] [--json FILE]

Open loop: arrivals (Poisson) do not wait for answers. A load of 1 is what batches of requests serve
when all of them are there at once, measured first. The same arrivals, seeds and numbers of steps
are given to

- `one`: one request at a time, in the order of arrival;
- `request`: up to `--batch` waiting requests start together, and the next ones when all of them
  have their pictures;
- `step`: each joins at the next step.

All three are `gentron.runtime.service.Service`, warmed up, with the same engines, threads, shapes
and decoder; only who may begin when differs. `first` is the time from arrival to the end of the
first step, `preview` to the first preview (after a quarter of the steps), `total` to the picture.
`gap` is the longest time in which no step ended although some request was under way: what texts and
decoders held up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gentron.errors import GenTronError
from gentron.runtime import Pipeline
from gentron.runtime.admission import Bounds
from gentron.runtime.observer import Observer
from gentron.runtime.result import machine
from gentron.runtime.scheduling import Capacity
from gentron.runtime.service import Options, Service

PROMPTS = ("a red apple", "a blue car", "a cat on green", "two birds", "a yellow star", "a house")
STEPS = (10, 15, 20)


@dataclass
class Drawn:
    """One request of the run; times in seconds from the start of the run."""

    number: int
    at: float
    steps: int
    first: float = 0.0
    preview: float = 0.0
    end: float = 0.0


@dataclass
class Run:
    name: str
    load: float
    drawn: list[Drawn]
    gap: float = 0.0
    calls: list[int] = field(default_factory=list)  # samples in each call


def arrivals(count: int, rate: float, seed: int) -> list[Drawn]:
    chance, at, found = random.Random(seed), 0.0, []
    for number in range(count):
        found.append(Drawn(number, at, chance.choice(STEPS)))
        at += chance.expovariate(rate)
    return found


def settings_of(pipe: Pipeline, one: Drawn, size: tuple[int, int]) -> Any:
    prompt = PROMPTS[one.number % len(PROMPTS)]
    return pipe.settings(prompt, seed=one.number, steps=one.steps, size=size)


class Watch(Observer):
    """The longest time between calls while something was under way."""

    def __init__(self) -> None:
        self.gap, self.calls, self._busy, self._last = 0.0, list[int](), False, 0.0

    def queued(self, waiting: int, running: int) -> None:  # noqa: ARG002
        if not self._busy:
            self._last = time.perf_counter()
        self._busy = running > 0

    def stepped(self, samples: int, rows: int, seconds: float) -> None:  # noqa: ARG002
        now = time.perf_counter()
        self.gap, self._last = max(self.gap, now - self._last - seconds), now
        self.calls.append(samples)


async def served(
    pipe: Pipeline,
    drawn: Sequence[Drawn],
    size: tuple[int, int],
    together: int | None,
    samples: int,
) -> Watch:
    """Gives a service what arrives: at once, or at most `together` requests when all of the ones
    before have their pictures."""
    watch = Watch()
    options = Options(
        bounds=Bounds(requests=1 << 20),
        capacity=Capacity(samples=samples, all_ride=together is not None),
        observer=watch,
    )

    async def follow(service: Service, one: Drawn, start: float) -> None:
        ticket = service.submit(settings_of(pipe, one, size), previews=[one.steps // 4])
        async for step in ticket:
            now = time.perf_counter() - start
            one.first = one.first or now
            if step.preview is not None:
                one.preview = now
        one.end = time.perf_counter() - start

    async def arrive(service: Service, one: Drawn, start: float) -> None:
        await asyncio.sleep(max(0.0, one.at - (time.perf_counter() - start)))
        if together is None:
            await follow(service, one, start)

    async with Service(pipe, options) as service:
        await service.warm_up([size])
        watch.gap, watch.calls = 0.0, []
        start = time.perf_counter()
        if together is None:
            await asyncio.gather(*(arrive(service, one, start) for one in drawn))
            return watch
        waiting = list(drawn)
        while waiting:
            await arrive(service, waiting[0], start)
            now = time.perf_counter() - start
            batch = [one for one in waiting[:together] if one.at <= now]
            waiting = waiting[len(batch) :]
            await asyncio.gather(*(follow(service, one, start) for one in batch))
    return watch


def capacity(pipe: Pipeline, size: tuple[int, int], most: int) -> float:
    """Requests a second when all of three batches are there at once."""
    drawn = [Drawn(k, 0.0, STEPS[k % len(STEPS)]) for k in range(3 * most)]
    asyncio.run(served(pipe, drawn, size, most, most))
    return len(drawn) / max(one.end for one in drawn)


def summary(run: Run) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {f"p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)}

    return {
        "way": run.name,
        "load": run.load,
        "per_second": len(run.drawn) / max(one.end for one in run.drawn),
        "first": spread([one.first - one.at for one in run.drawn]),
        "preview": spread([one.preview - one.at for one in run.drawn]),
        "total": spread([one.end - one.at for one in run.drawn]),
        "gap": run.gap,
        "samples_per_call": float(np.mean(run.calls)) if run.calls else None,
    }


def measure(pipe: Pipeline, given: argparse.Namespace, say: Callable[[str], None]) -> Any:
    size = given.size
    full = capacity(pipe, size, given.batch)
    say(f"{machine()}, {threading.active_count()} threads; a load of 1 is {full:.2f} requests/s")
    say("load  way      requests/s  first p50    p95  preview p95  total p50    p95    p99  gap")
    rows = []
    for load in given.loads:
        for name in ("one", "request", "step"):
            drawn = arrivals(given.requests, load * full, given.seed)
            run = Run(name, load, drawn)
            together = {"one": 1, "request": given.batch, "step": None}[name]
            most = together or given.samples
            watch = asyncio.run(served(pipe, drawn, size, together, most))
            run.gap, run.calls = watch.gap, watch.calls
            rows.append(row := summary(run))
            first, total = row["first"], row["total"]
            say(
                f"{load:>4}  {name:<8} {row['per_second']:>9.2f} {first['p50']:>10.2f}"
                f" {first['p95']:>6.2f} {row['preview']['p95']:>12.2f} {total['p50']:>10.2f}"
                f" {total['p95']:>6.2f} {total['p99']:>6.2f} {run.gap:>5.2f}"
            )
    return {"machine": machine(), "capacity": full, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("bundle", nargs="?", default="emoji")
    parser.add_argument("--backend")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="requests of `request` together")
    parser.add_argument("--samples", type=int, default=Capacity.samples, help="of `step` under way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="64x64", help="pixels, WIDTHxHEIGHT")
    parser.add_argument("--loads", default="0.5,0.7,0.9,1.1,1.5")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.loads = [float(load) for load in given.loads.split(",")]
    given.size = tuple(int(side) for side in given.size.split("x"))
    try:
        with Pipeline.load(given.bundle, backend=given.backend) as pipe:
            found = measure(pipe, given, lambda line: print(line, flush=True))
    except GenTronError as error:
        sys.exit(f"error: {error}")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
