"""One denoising step beside torch: eager in float32, compiled in bfloat16.

    python benchmarks/step.py [-m xl2] [--size 256x256] [--rounds 5] [-o NAME]

Two runs of `gentron-bench`, each with all its contenders in turn, and the share of the machine's
matrix products that our step reaches. For `xl2`, which is exported once with random weights, this
takes a gigabyte of disk, 6 GB of memory and about a quarter of an hour, most of it compiling.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gentron.bench.report import Report
from gentron.bench.run import run_benchmark

BESIDE = {"fp32": ["torch", "diffusers"], "bf16": ["torch-compile", "diffusers-compile"]}


def measure(name: str, precision: str, options: argparse.Namespace) -> Report:
    width, _, height = options.size.partition("x")
    return run_benchmark(
        name,
        backends=options.backend.split(","),
        against=options.against.split(",") if options.against else BESIDE[precision],
        stages=["step"],
        precisions=[precision],
        size=(int(width), int(height)),
        rounds=options.rounds,
        seconds=options.seconds,
        say=lambda line: sys.stderr.write(line + "\n"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="xl2")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--against", help="instead of torch and diffusers, compiled in bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each in a round")
    parser.add_argument("-o", "--output", type=Path, help="also write NAME.json and NAME.md")
    options = parser.parse_args()
    reports = [measure(options.model, p, options) for p in options.precision.split(",")]
    text = "\n".join(report.markdown() for report in reports)
    sys.stdout.write(text)
    if options.output:
        options.output.with_suffix(".md").write_text(text, "utf-8")
        values = [report.to_dict() for report in reports]
        options.output.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
