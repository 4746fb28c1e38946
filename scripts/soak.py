"""A server with more work than it can do, for minutes: is anything lost, mixed up, or leaked?

    python scripts/soak.py [BUNDLE] [--minutes 10] [--load 1.5] [--settle 20] [--size 64x64]
                           [--backend NAME] [--seed 0]

Starts `gentron-serve`, measures what it serves when eight clients ask without pause, then sends
that times `--load` at random times (Poisson; nobody waits for answers). Every request is one of
some dozens, drawn before by a pipeline of its own: an answer of another picture (by more than one
level of 255) is mixed up, anything but a picture or a 429 with `Retry-After` is lost. The server's
memory is read all the while: it grew if the mean of the last quarter is more than 2 %, and more
than 32 MiB, over that of the second. Prints one row; ends with 1 if anything was lost or mixed up,
or (from one minute on) memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

from gentron.runtime import Pipeline

PROMPTS = ("a red apple", "a blue car", "a cat on a green background", "two birds")
SEEDS = (1, 2, 1 << 40)
STEPS = (5, 10, 15)
GUIDANCE = (1.0, 4.0)
SERVER = "import sys; sys.argv[0] = 'gentron-serve'; from gentron.cli.serve import main; main()"
CLIENTS = 8
TIMEOUT = 300.0
Wanted = tuple[str, int, int, float]


@dataclass
class Seen:
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)


def expected(options: argparse.Namespace, size: tuple[int, int]) -> dict[Wanted, Any]:
    found = {}
    with Pipeline.load(options.bundle, backend=options.backend) as pipe:
        for one in itertools.product(PROMPTS, SEEDS, STEPS, GUIDANCE):
            prompt, seed, steps, guidance = one
            found[one] = pipe(prompt, seed=seed, steps=steps, guidance=guidance, size=size).images[
                0
            ]
    return found


def picture(content: str) -> npt.NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), np.int16)


async def ask(client: httpx.AsyncClient, one: Wanted, size: str, pictures: Any, seen: Seen) -> None:
    prompt, seed, steps, guidance = one
    extra = {"seed": seed, "steps": steps, "guidance": guidance}
    try:
        answer = await client.post(
            "/v1/images/generations", json={"prompt": prompt, "size": size, "gentron": extra}
        )
    except httpx.HTTPError as error:
        seen.outcomes["lost"] += 1
        seen.wrong.append(f"{one}: {type(error).__name__}: {error}")
        return
    if answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1:
        seen.outcomes["sent away"] += 1
    elif answer.status_code != 200:
        seen.outcomes["lost"] += 1
        seen.wrong.append(f"{one}: {answer.status_code}: {answer.text[:200]}")
    else:
        found = picture(answer.json()["data"][0]["b64_json"])
        off = int(np.abs(found - pictures[one]).max())
        seen.outcomes["drawn" if off <= 1 else "mixed up"] += 1
        if off > 1:
            seen.wrong.append(f"{one}: off by {off}")


async def capacity(client: httpx.AsyncClient, given: Any, seconds: float) -> float:
    """Requests a second that the server answers when `CLIENTS` ask without pause."""
    chance, end = random.Random(1), time.monotonic() + seconds
    done = 0

    async def again() -> None:
        nonlocal done
        while time.monotonic() < end:
            await given(client, chance)
            done += 1

    started = time.monotonic()
    await asyncio.gather(*(again() for _ in range(CLIENTS)))
    return done / (time.monotonic() - started)


async def soak(options: argparse.Namespace, url: str, server: int) -> tuple[Seen, float]:
    size = tuple(int(side) for side in options.size.split("x"))
    pictures = await asyncio.to_thread(expected, options, size)
    wanted, process = list(pictures), psutil.Process(server)
    # Less than the server's five seconds, so that nobody asks on a connection as it is closed.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:
        await ready(client)
        trial, seen = Seen(), Seen()

        async def one(client: httpx.AsyncClient, chance: random.Random) -> None:
            await ask(client, chance.choice(wanted), options.size, pictures, trial)

        await capacity(client, one, options.settle)  # every shape of a call is met
        full = await capacity(client, one, options.settle)
        chance, tasks = random.Random(options.seed), set[asyncio.Task[None]]()
        start = time.monotonic()
        at, end = start, start + 60 * options.minutes
        while at < end:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            task = asyncio.create_task(
                ask(client, chance.choice(wanted), options.size, pictures, seen)
            )
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            seen.memory.append((time.monotonic() - start, process.memory_info().rss))
            at += chance.expovariate(options.load * full)
        await asyncio.gather(*tasks)
    seen.wrong += trial.wrong
    return seen, full


async def ready(client: httpx.AsyncClient) -> None:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        try:
            if (await client.get("/readyz")).status_code == 200:
                return
        except httpx.ConnectError:
            pass  # it has not begun to listen
        await asyncio.sleep(0.2)
    sys.exit("the server did not become ready; see its lines above")


def growth(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """Mean bytes of the second and of the last quarter."""
    end = memory[-1][0]
    quarters = [[rss for at, rss in memory if k <= 4 * at / end <= k + 1] for k in (1, 3)]
    early, late = (statistics.fmean(quarter) for quarter in quarters)
    return early, late


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("bundle", nargs="?", default="emoji")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--load", type=float, default=1.5, help="over what the server can do")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds to measure that")
    parser.add_argument("--size", default="64x64", help="pixels, WIDTHxHEIGHT")
    parser.add_argument("--backend")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = ["-m", options.bundle, "--port", str(port), "--warm-up", options.size]
    command += ["--max-per-client", "1000000"] if options.backend is None else [
        "--max-per-client", "1000000", "--backend", options.backend]  # fmt: skip
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, *command], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        seen, full = asyncio.run(soak(options, f"http://127.0.0.1:{port}", server.pid))
    finally:
        server.terminate()
        server.wait(60)
    early, late = growth(seen.memory)
    leaks = options.minutes >= 1 and late - early > max(0.02 * early, 32 << 20)
    for line in seen.wrong[:20]:
        print(line, file=sys.stderr)
    count = seen.outcomes
    print(
        f"{options.minutes:g} min at {options.load:g} x {full:.1f} requests/s: "
        f"{sum(count.values())} requests, {count['drawn']} drawn, "
        f"{count['sent away']} sent away, {count['lost']} lost, {count['mixed up']} mixed up; "
        f"memory {early / 2**20:.0f} MiB, then {late / 2**20:.0f} MiB"
    )
    sys.exit(1 if seen.wrong or leaks or server.returncode else 0)


if __name__ == "__main__":
    main()
