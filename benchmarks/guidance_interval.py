"""What guidance in a limited interval saves, beside what fewer steps save in the same time.

    python benchmarks/guidance_interval.py [-m emoji] [--interval LO,HI ...] [--sample 120]
                                           [--rounds 5] [--backend onnxruntime] [--json FILE]

For each interval of noise levels: the rows of the network and the seconds of a picture with it, and
of the number of steps, all of them guided, that takes the same time. Ways are timed in turns. For a
bundle that knows nouns (emoji) both are also scored: how often the noun that was asked for is what
the scorer of `gentron-train score` sees first, over the same prompts and noise. That needs torch
and the font; --sample 0 leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentron.guidance import Interval, check_interval
from gentron.runtime import Pipeline
from gentron.solvers import solver_table

PROMPT, SEED = "a red apple", 1
# Of noise levels, as shares of the way from the last step's to the first's.
SHARES = ((0.0, 0.7), (0.2, 0.8), (0.3, 1.0))


@dataclass(frozen=True)
class Way:
    """One way to draw a picture."""

    steps: int
    guidance: float
    interval: Interval | None = None

    @property
    def words(self) -> str:
        if self.guidance == 1:
            return f"{self.steps} steps, none guided"
        where = "every step guided"
        if self.interval is not None:
            where = f"guided from {self.interval[0]:.3g} to {self.interval[1]:.3g}"
        return f"{self.steps} steps, {where}"

    def draw(self, pipe: Pipeline, prompt: str, seed: int) -> Any:
        """The generation, at its end."""
        generation = pipe.stream(prompt, seed=seed, steps=self.steps, guidance=self.guidance,
                                 guidance_interval=self.interval)  # fmt: skip
        for _ in generation:
            pass
        return generation


def rows(pipe: Pipeline, way: Way) -> int:
    """Rows of all steps."""
    request = way.draw(pipe, PROMPT, SEED)._request
    return sum(len(request.branches_at(step)) for step in range(way.steps))


def seconds(pipe: Pipeline, ways: Sequence[Way], rounds: int) -> list[float]:
    """Of conditioning and steps, the median over the rounds; the ways take turns."""
    found: list[list[float]] = [[] for _ in ways]
    for round_ in range(rounds + 1):
        for times, way in zip(found, ways, strict=True):
            stages = way.draw(pipe, PROMPT, SEED).result().stages
            if round_:  # the first compiles shapes and fills caches
                times.append(sum(s.seconds for s in stages if s.stage in ("condition", "denoise")))
    return [statistics.median(times) for times in found]


def default_intervals(pipe: Pipeline, steps: int) -> list[Interval]:
    bundle = pipe.bundle
    table = solver_table(bundle.manifest.defaults.solver, bundle.schedule, steps)
    sigmas = [float(s) for s in bundle.schedule.sigmas(table.timesteps)]
    low, high = min(sigmas), max(sigmas)

    def level(share: float) -> float:
        if not share:
            return 0.0  # the last step is among the guided ones
        if pipe.bundle.schedule.is_flow:
            return low + share * (high - low)
        return low * (high / low) ** share

    return [(level(a), level(b)) for a, b in SHARES]


def score(pipe: Pipeline, ways: Sequence[Way], sample: int, font: Path | None) -> Iterator[dict]:
    """Shares of first choices and of the first five, way by way."""
    import torch

    from gentron.train import prompts
    from gentron.train.scenes import find_font, load_sprites
    from gentron.train.score import judge_all, see, shares
    from gentron.train.scorer import TemplateScorer

    torch.set_num_threads(1)
    names = prompts.vocabulary(pipe.path)
    asked = prompts.select_sets(prompts.prompt_sets(names), ["nouns"], sample)["nouns"]
    scorer = TemplateScorer(load_sprites(find_font(font), names), names)
    for way in ways:
        seen = []
        for prompt in asked:
            picture = way.draw(pipe, prompt.text, prompts.noise_seed(prompt.text, SEED)).result()
            pixels = torch.from_numpy(picture.images[0].copy()).permute(2, 0, 1).float() / 255
            seen.append(see(scorer, prompt, pixels))
        yield shares("nouns", judge_all(scorer.names, asked, seen)) | {"pictures": len(asked)}
        sys.stderr.write(f"{way.words}: {len(asked)} pictures scored\n")


def in_the_same_time(full: Way, cost: float, of: float, fewest: int = 1) -> Way:
    """As many guided steps as take `cost` seconds, where all of them take `of`."""
    return Way(max(fewest, round(full.steps * cost / of)), full.guidance)


def measure(pipe: Pipeline, options: argparse.Namespace) -> list[dict[str, Any]]:
    defaults = pipe.bundle.manifest.defaults
    full = Way(options.steps or defaults.steps, options.guidance or defaults.guidance)
    intervals = options.interval or default_intervals(pipe, full.steps)
    limited = [Way(full.steps, full.guidance, interval) for interval in intervals]
    whole, *costs = seconds(pipe, [full, *limited], options.rounds)
    pairs = [(way, in_the_same_time(full, cost, whole))
             for way, cost in zip(limited, costs, strict=True)]  # fmt: skip
    ways = list(dict.fromkeys([full, *(w for pair in pairs for w in pair), Way(full.steps, 1.0)]))
    times = seconds(pipe, ways, options.rounds)
    scores: Iterable[dict] = ({} for _ in ways)
    if options.sample:
        scores = score(pipe, ways, options.sample, options.font)
    return [
        {"way": way.words, "rows": rows(pipe, way), "seconds": cost, "share": cost / times[0],
         **found}
        for way, cost, found in zip(ways, times, scores, strict=True)
    ]  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    scored = "object" in found[0]
    heads = ["", "rows", "seconds", "of all guided"]
    heads += ["first choice", "first five"] if scored else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in found:
        cells = [row["way"], str(row["rows"]), f"{row['seconds']:.3f}", f"{row['share']:.0%}"]
        if scored:
            cells += [f"{row['object']:.0%}", f"{row['first five']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(text: str) -> Interval:
    low, high = (float(part) for part in text.split(","))
    return check_interval((low, high))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="emoji", help="packaged name or folder")
    parser.add_argument("--interval", action="append", type=_interval, metavar="LO,HI")
    parser.add_argument("--steps", type=int, help="[the bundle's]")
    parser.add_argument("--guidance", type=float, help="[the bundle's]")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--sample", type=int, default=120, help="nouns to score; 0: none")
    parser.add_argument("--font", type=Path, help="the font the model was trained with")
    parser.add_argument("--backend", default="onnxruntime", help="OpenVINO compiles each row count")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    with Pipeline.load(options.model, backend=options.backend) as pipe:
        found = measure(pipe, options)
        running = pipe.backend.describe()
    sys.stdout.write(f"{options.model}, {running}, {os.cpu_count()} cores, ")
    sys.stdout.write(f"{platform.machine()}; {time.strftime('%Y-%m-%d')}\n\n{table(found)}\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
