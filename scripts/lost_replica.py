"""Ray on two nodes of this machine: a queue makes one replica two, then one node is killed.

Every request has to be answered, with the picture that a lone pipeline draws. Prints one line of
JSON; exit status 1 if anything was lost or differs.

    python scripts/lost_replica.py --requests 24
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gentron.engines import EngineOptions
from gentron.runtime import Pipeline
from gentron.runtime import ray_serve as cluster

SAMPLES = 4  # that share a replica's steps
PROMPTS = ("a red apple", "a cat", "two birds", "a house in the snow")


def load(bundle: str) -> Pipeline:
    return Pipeline.load(bundle, backend="onnxruntime", options=EngineOptions(threads=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", default="emoji")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pixels", type=int, default=64)
    asked = parser.parse_args()
    if Path(asked.bundle).exists():
        asked.bundle = str(Path(asked.bundle).resolve())
    sys.path.insert(0, str(Path(__file__).parent))  # replicas import `load` from here
    found = run(asked)
    print(json.dumps(found))
    lost = asked.requests - found["completed"]
    return 0 if lost == 0 and found["worst"] <= 1 and found["asked_again"] else 1


def run(asked: argparse.Namespace) -> dict[str, Any]:
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    from lost_replica import load as load_there  # by name, which replicas can import

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    nodes = Cluster()
    try:
        # The front's own node takes no replica, and each of the two has room for one.
        nodes.add_node(**{**node, "num_cpus": 0})
        workers = [nodes.add_node(**node) for _ in range(2)]
        cluster.connect(nodes.address)
        soon = {"upscale_delay_s": 1, "look_back_period_s": 2, "metrics_interval_s": 1}
        replicas = cluster.Replicas(least=1, most=2, samples=SAMPLES, tuning=soon)
        with load(asked.bundle) as alone:
            front = cluster.open_front(
                alone.bundle, partial(load_there, asked.bundle), replicas,
                warm_up=[(asked.pixels, asked.pixels)],
            )  # fmt: skip
            return asyncio.run(lose_one(asked, front, nodes, workers, alone))
    finally:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        nodes.shutdown()


async def lose_one(
    asked: argparse.Namespace, front: cluster.Front, nodes: Any, workers: list[Any], alone: Pipeline
) -> dict[str, Any]:
    size = (asked.pixels, asked.pixels)
    settings = [
        alone.settings(PROMPTS[i % len(PROMPTS)], seed=i, steps=asked.steps, size=size)
        for i in range(asked.requests)
    ]
    async with front:
        grown = await queue_until_there_are_two(front, settings[0])
        started = time.monotonic()
        tickets = [front.submit(one) for one in settings]
        under_way = min(asked.requests, SAMPLES + 1)  # more than one replica steps
        while sum(ticket.done_steps >= 1 for ticket in tickets) < under_way:
            await asyncio.sleep(0.005)
        before = sum(ticket.finished for ticket in tickets)
        # SIGKILL of the raylet: the processes of its replica end with it.
        await asyncio.to_thread(nodes.remove_node, workers[1], allow_graceful=False)
        answers = await asyncio.gather(*(t.result() for t in tickets), return_exceptions=True)
        seconds = time.monotonic() - started
    pictures = [answer for answer in answers if not isinstance(answer, BaseException)]
    for answer in answers:
        if isinstance(answer, BaseException):
            print(repr(answer), file=sys.stderr)
    return {
        "requests": asked.requests,
        "seconds_until_two_replicas": round(grown, 1),
        "completed_before_the_kill": before,
        "asked_again": front.scheduler.asked_again,
        "completed": len(pictures),
        "worst": max(difference(picture, alone) for picture in pictures),
        "seconds": round(seconds, 1),
    }


async def queue_until_there_are_two(front: cluster.Front, settings: Any) -> float:
    """Keeps more requests under way than one replica is to hold; returns the seconds it took."""
    from ray import serve

    started, tickets = time.monotonic(), set()
    while running_replicas(serve.status(), front.scheduler.name) < 2:
        if time.monotonic() - started > 240:
            raise TimeoutError("the queue brought no second replica in 240 s")
        tickets = {ticket for ticket in tickets if not ticket.finished}
        tickets |= {front.submit(settings) for _ in range(10 - len(tickets))}
        await asyncio.sleep(0.1)
    await asyncio.gather(*(ticket.result() for ticket in tickets))
    return time.monotonic() - started


def running_replicas(status: Any, name: str) -> int:
    states = status.applications[name].deployments["Replica"].replica_states
    return int(states.get("RUNNING", 0))


def difference(picture: Any, alone: Pipeline) -> int:
    """The largest, of 255, to what a lone pipeline draws."""
    wanted = alone.generate(picture.settings)
    for _ in wanted:
        pass
    return int(np.abs(picture.videos.astype(int) - wanted.result().videos).max())


if __name__ == "__main__":
    sys.exit(main())
