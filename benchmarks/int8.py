"""What weights of 8 bits gain on this CPU, and what they cost: probes and, for `emoji`, the score.

    python benchmarks/int8.py [BUNDLE] [--sample N] [--seconds S] [--json]

Steps of all precisions take turns in one run, at the bundle's own size with guidance. The loss is
the worst of the denoiser's golden probes. The score (of bundles with `nouns.txt`, and where the
font is installed) is the share of N nouns that are the scorer's first choice, the same prompts and
seeds in each precision. Exit code 1 where the probes lose more than `agreement.TOLERANCES["int8"]`
allows, or the score more than SCORE_BOUND.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np

from gentron.agreement import TOLERANCES
from gentron.bundle import Bundle
from gentron.engines import Backend, backend_named, bundle_graph
from gentron.engines.base import Call
from gentron.engines.machine import cpu_name
from gentron.engines.probe_check import check_component
from gentron.runtime import Pipeline

SCORE_BOUND = 0.05  # of the share of nouns that are first choice; 100 nouns scatter by as much


def step(backend: Backend, bundle: Bundle, precision: str, stack: ExitStack) -> Call:
    """One guided step of a picture, bound and warm."""
    engine = stack.enter_context(
        closing(backend.load(bundle_graph(bundle, "denoiser", "fp32"), precision))
    )
    width, height = (side // bundle.vae_factor for side in bundle.native_size)
    sizes = {"B": 1, "R": 2, "F": 1, "T": 2, "U": 2, "h": height, "w": width}
    component, rng = engine.component, np.random.default_rng(0)
    buffers = {}
    for spec in (*component.inputs, *component.outputs):
        shape = tuple(sizes[a] if isinstance(a, str) else a for a in spec.axes)
        buffers[spec.name] = engine.buffer(spec.name, shape)
        if spec.numpy_dtype(engine.compute).kind == "f" and spec in component.inputs:
            values = rng.normal(size=shape).astype(spec.numpy_dtype(engine.compute))
            buffers[spec.name].write(values)
    call = engine.bind(buffers)
    for _ in range(2):
        call.run()
    return call


def in_turns(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[next(iter(times))]) < 5:
        for name, call in calls.items():
            started = time.perf_counter()
            call.run()
            times[name].append(time.perf_counter() - started)
    return times


def score(bundle: Bundle, precision: str, sample: int) -> float:
    """Share of nouns that are the scorer's first choice."""
    from gentron.cli.score import Drawer, font_scorer
    from gentron.train import prompts
    from gentron.train.score import score_sets

    with Pipeline.load(bundle.path, backend="openvino", precision=precision) as pipe:
        names = prompts.vocabulary(pipe.path)
        chosen = prompts.select_sets(prompts.prompt_sets(names), ["nouns"], sample)
        scorer, _ = font_scorer(None, names)
        drawer = Drawer(pipe, 0, {})
        (result,) = score_sets(scorer, chosen, drawer.artist, {})
        return float(result.shares("generated")["object"])


def rows(bundle: Bundle, sample: int, seconds: float) -> Iterator[dict[str, float | str | None]]:
    with ExitStack() as stack:
        backend = stack.enter_context(backend_named("openvino"))
        names = (*backend.precisions, "int8")
        calls = {name: step(backend, bundle, name, stack) for name in names}
        times = in_turns(calls, seconds)
        for name in names:
            check = check_component(bundle, backend, "denoiser", name)
            scored = bool(sample) and (bundle.path / "nouns.txt").is_file()
            yield {
                "precision": name,
                "median_s": statistics.median(times[name]),
                "least_s": min(times[name]),
                "loss": max((a.max_relative for a in check.agreements), default=None),
                "probes": check.result,
                "score": score(bundle, name, sample) if scored else None,
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", nargs="?", default="emoji")
    parser.add_argument("--sample", type=int, default=100, help="nouns to draw; 0: no score")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = list(rows(Bundle.open(asked.bundle), asked.sample, asked.seconds))
    best = min(row["median_s"] for row in found if row["precision"] != "int8")
    int8 = found[-1]
    scores = [row["score"] for row in found]
    lost = None if scores[0] is None else max(scores[:-1]) - scores[-1]
    kept = int8["probes"] == "pass" and (lost is None or lost <= SCORE_BOUND)
    if asked.json:
        print(json.dumps({"machine": cpu_name(), "rows": found, "score_lost": lost, "kept": kept}))
        return int(not kept)
    print(f"{asked.bundle}, {cpu_name()}")
    for row in found:
        loss = "-" if row["loss"] is None else f"{row['loss']:.2%}"
        first = "" if row["score"] is None else f"  {row['score']:.0%} first choice"
        print(f"  {row['precision']:<5} {row['median_s'] * 1e3:8.1f} ms a step, loss {loss}{first}")
    print(f"  int8 takes {int8['median_s'] / best:.2f} of the fastest other's time; "
          f"{TOLERANCES['int8'].max_relative:.0%} of loss and {SCORE_BOUND:.0%} of score are "
          f"allowed: {'kept' if kept else 'refused'}")  # fmt: skip
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
