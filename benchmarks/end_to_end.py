"""A picture from prompt to pixels, warm, beside the same weights in a pipeline like diffusers'.

    python benchmarks/end_to_end.py [-m emoji] [--backend openvino,onnxruntime] [--precision fp32]
                                    [--steps 20] [--rounds 7] [--json FILE]

Every pipeline is a process of its own, loaded before it is timed; they take turns, and each call
has a prompt that was not seen before. The pictures are compared before anything is timed. torch
gets tcmalloc where it is installed, fused attention and the same threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from contest import contest, markdown

from gentron.bench.machine import physical_cores
from gentron.bench.peers import allocator
from gentron.bench.runner import Runner
from gentron.bench.worker import serve

PROMPT = "a red apple"
FOLLOWED = "a red apple, number {}"
SEED = 1
CLOSE = 3  # of 255: two float32 pipelines round some pixels differently


class Ours(Runner):
    def __init__(self, asked: dict[str, Any]):
        from gentron.runtime import Pipeline

        self._pipeline = Pipeline.load(
            asked["model"], backend=asked["name"], precision=asked["precision"]
        )
        self._asked, self._numbers, self._pixels = asked, itertools.count(), np.empty(0)
        version = self._pipeline.backend.describe()
        self.facts = {"label": f"GenTron on {version}, {asked['precision']}"}

    def draw(self, prompt: str) -> None:
        asked = self._asked
        result = self._pipeline(
            prompt, seed=SEED, steps=asked["steps"], guidance=asked["guidance"]
        )  # fmt: skip
        self._pixels = result.images[0]

    def run(self) -> None:
        self.draw(FOLLOWED.format(next(self._numbers)))

    def outputs(self) -> dict[str, Any]:
        self.draw(PROMPT)
        return {"pixels": self._pixels}


class Torch(Runner):
    def __init__(self, asked: dict[str, Any]):
        import torch
        from torch_pipeline import TorchPipeline

        from gentron.bundle import locate

        self._pipeline = TorchPipeline(locate(asked["model"]), asked["threads"])
        self._asked, self._numbers, self._pixels = asked, itertools.count(), np.empty(0)
        self.facts = {"label": f"torch {torch.__version__}, as diffusers' pipelines{allocator()}"}

    def draw(self, prompt: str) -> None:
        asked = self._asked
        self._pixels = self._pipeline(
            prompt, seed=SEED, steps=asked["steps"], guidance=asked["guidance"]
        )

    def run(self) -> None:
        self.draw(FOLLOWED.format(next(self._numbers)))

    def outputs(self) -> dict[str, Any]:
        self.draw(PROMPT)
        return {"pixels": self._pixels}


def make(line: str) -> Runner:
    asked = json.loads(line)
    return Torch(asked) if asked["name"] == "torch" else Ours(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="emoji")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each in a round")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.exit(serve(make))
    shared = {key: vars(options)[key] for key in ("model", "steps", "guidance", "threads")}
    asked = [
        shared | {"name": name, "precision": precision}
        for name in options.backend.split(",")
        for precision in options.precision.split(",")
    ]
    asked.append(shared | {"name": "torch", "precision": "fp32"})
    with tempfile.TemporaryDirectory() as folder:
        rows = contest(
            __file__, asked, options.rounds, options.seconds, Path(folder), _same_picture
        )
    title = f"{options.model}, {options.steps} steps, prompt to pixels, warm"
    sys.stdout.write(markdown(title, rows, options.rounds) + "\n")
    if options.json:
        options.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")


def _same_picture(name: str, precision: str, one: Any, other: Any) -> None:
    """In float32 the pictures agree but for rounding; in bfloat16 they only resemble each other."""
    worst = int(np.abs(one["pixels"].astype(int) - other["pixels"].astype(int)).max())
    if precision == "fp32" and worst > CLOSE:
        raise SystemExit(f"{name}: its picture is off by {worst} of 255; not the same work")


if __name__ == "__main__":
    main()
