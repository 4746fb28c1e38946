"""Requests at random times on a real bundle: by step, by batches of requests, one at a time.

    python benchmarks/serving.py [BUNDLE] [--backend NAME] [--requests 60] [--size 64x64]
                                 [--loads 0.5,0.7,0.9,1.1,1.5] [--json FILE]

Open loop: arrivals (Poisson) do not wait for answers. A load of 1 is what batches of requests serve
when all of them are there at once, measured first. The same arrivals, seeds and numbers of steps
are given to

- `one`: one request at a time, in the order of arrival;
- `request`: up to `--batch` waiting requests start together and end together;
- `step`: `gentron.runtime.service.Service`.

The first two run the same loop and decoder in one thread. `first` is the time from arrival to the
end of the first step, `preview` to the first preview (after a quarter of the steps), `total` to the
picture. `gap` is the longest time in which no step of a `step` run ended although some request was
under way: what texts and decoders held up.
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
from gentron.runtime.loop import DenoiseLoop
from gentron.runtime.observer import Observer
from gentron.runtime.preview import predicted_clean
from gentron.runtime.request import Request
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


def in_batches(pipe: Pipeline, drawn: Sequence[Drawn], size: tuple[int, int], most: int) -> None:
    """Waits for arrivals, runs those that wait together to their end."""
    waiting, start = list(drawn), time.perf_counter()
    now = lambda: time.perf_counter() - start  # noqa: E731
    while waiting:
        time.sleep(max(0.0, waiting[0].at - now()))
        batch = [one for one in waiting[:most] if one.at <= now()]
        waiting = waiting[len(batch) :]
        requests = [Request.of(pipe.bundle, settings_of(pipe, one, size)) for one in batch]
        samples = []
        for request in requests:
            texts = {text.prompt: text for text in pipe._text.encode(request.prompts)}
            samples += request.samples(texts)
        shape = requests[0].shape
        loop = DenoiseLoop(pipe.bundle.config, pipe._engines, samples, shape, size[::-1])
        for step in loop.run():
            for row, one in enumerate(batch):
                if step.index == 0:
                    one.first = now()
                if step.index == one.steps // 4:
                    before, after = loop.before_and_after()
                    sample, index = samples[row], step.index
                    noise = sample.noise(index, shape) if sample.needs_noise(index) else None
                    clean = predicted_clean(
                        pipe.bundle.schedule, sample.table, index, before[row], after[row], noise
                    )
                    pipe.decode(clean[None])
                    one.preview = now()
        for row, one in enumerate(batch):
            pipe.decode(loop.latents()[row : row + 1])
            one.end = now()


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


async def by_step(pipe: Pipeline, drawn: Sequence[Drawn], size: tuple[int, int]) -> Watch:
    watch = Watch()
    options = Options(bounds=Bounds(requests=1 << 20), capacity=Capacity(), observer=watch)

    async def follow(service: Service, one: Drawn, start: float) -> None:
        await asyncio.sleep(max(0.0, one.at - (time.perf_counter() - start)))
        ticket = service.submit(settings_of(pipe, one, size), previews=[one.steps // 4])
        async for step in ticket:
            now = time.perf_counter() - start
            one.first = one.first or now
            if step.preview is not None:
                one.preview = now
        one.end = time.perf_counter() - start

    async with Service(pipe, options) as service:
        await service.warm_up([size])
        watch.gap, watch.calls = 0.0, []
        start = time.perf_counter()
        await asyncio.gather(*(follow(service, one, start) for one in drawn))
    return watch


def capacity(pipe: Pipeline, size: tuple[int, int], most: int) -> float:
    """Requests a second when all of three batches are there at once."""
    drawn = [Drawn(k, 0.0, STEPS[k % len(STEPS)]) for k in range(3 * most)]
    in_batches(pipe, drawn[:most], size, most)  # compiles and caches
    in_batches(pipe, drawn, size, most)
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
            if name == "step":
                watch = asyncio.run(by_step(pipe, drawn, size))
                run.gap, run.calls = watch.gap, watch.calls
            else:
                in_batches(pipe, drawn, size, 1 if name == "one" else given.batch)
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
    parser.add_argument("--batch", type=int, default=8)
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
