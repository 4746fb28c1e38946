"""How a step grows with tokens, rows and frames, measured beside what is counted.

    python benchmarks/growth.py [-m g2-video] [--depth 4] [--precision bf16] [--rounds 3] [-o NAME]

A few blocks of the preset are enough: all are alike, so the share of each part is that of the
whole. One contender and the machine's peak in turn at every shape; seconds and counted operations
are given as multiples of the first shape's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gentron.bench.machine import machine_facts
from gentron.bench.run import run_benchmark

# (what grows, size in pixels, frames, guidance): guidance 1 is one row, another two
SHAPES = (
    ("tokens", 256, 1, 4.5),
    ("tokens", 384, 1, 4.5),
    ("tokens", 512, 1, 4.5),
    ("tokens", 768, 1, 4.5),
    ("rows", 256, 1, 1.0),
    ("rows", 256, 1, 4.5),
    ("frames", 256, 1, 4.5),
    ("frames", 256, 2, 4.5),
    ("frames", 256, 4, 4.5),
    ("frames", 256, 8, 4.5),
)
SHORT = (SHAPES[0], SHAPES[4])
COLUMNS = ("grows", "tokens", "rows", "frames", "step", "times", "operations", "times", "GFLOP/s",
           "of peak")  # fmt: skip


def measure(options: argparse.Namespace, side: int, frames: int, guidance: float) -> dict[str, Any]:
    report = run_benchmark(
        options.model,
        backends=[options.backend],
        stages=["step"],
        precisions=[options.precision],
        size=(side, side),
        frames=frames,
        guidance=guidance,
        motion=1.0,
        depth=options.depth,
        rounds=options.rounds,
        seconds=options.seconds,
        say=lambda line: sys.stderr.write(line + "\n"),
    )
    return report.rows[0].to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="g2-video")
    parser.add_argument("--depth", type=int, default=4, help="blocks of a preset; 0: all")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each in a round")
    parser.add_argument("--short", action="store_true", help="two shapes only")
    parser.add_argument("--side", type=int, help="of the first shape, for small models [256]")
    parser.add_argument("-o", "--output", type=Path, help="also write NAME.json")
    options = parser.parse_args()
    rows = []
    for grows, side, frames, guidance in SHORT if options.short else SHAPES:
        pixels = side * options.side // SHAPES[0][1] if options.side else side
        rows.append({"grows": grows, **measure(options, pixels, frames, guidance)})
    machine = machine_facts()
    sys.stdout.write(f"{options.model}, {options.depth or 'all'} blocks, {options.precision} on ")
    sys.stdout.write(f"{rows[0]['label']}; {machine['cpu']}, {machine['cores']} cores\n\n")
    sys.stdout.write("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n")
    for row in rows:
        first = next(r for r in rows if r["grows"] == row["grows"])
        sys.stdout.write(line_of(row, first) + "\n")
    if options.output:
        values = {"machine": machine, "depth": options.depth, "rows": rows}
        options.output.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def line_of(row: dict[str, Any], first: dict[str, Any]) -> str:
    sizes, seconds, flops = row["sizes"], row["median_s"], row["flops"]
    cells = [row["grows"], str(sizes["h"] * sizes["w"] // 4), str(sizes["R"]), str(sizes["F"])]
    cells += [f"{seconds:.3f} s", f"{seconds / first['median_s']:.2f}"]
    cells += [f"{flops / 1e12:.3f} T", f"{flops / first['flops']:.2f}"]
    cells += [f"{flops / seconds / 1e9:.0f}", f"{row['peak_share']:.0%}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
