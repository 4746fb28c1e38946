"""From starting a process to a PNG on disk, beside the same weights in torch and diffusers.

    python benchmarks/start.py [-m emoji] [--backend openvino,onnxruntime] [--steps 20] [--rounds 5]

Each run is a new process: `gentron-run image`, with engines from the cache as after the first run,
and `benchmarks/torch_pipeline.py`. They take turns. Beside them: what importing takes alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gentron.bench.machine import machine_facts, physical_cores
from gentron.bench.peers import environment

RUN = "import sys; sys.argv[0] = 'gentron-run'; from gentron.cli.run import main; main()"
PROMPT = "a red apple"
IMPORTS = {
    "import gentron.runtime": "import gentron.runtime",
    "import torch, diffusers, transformers": "import torch, transformers, diffusers\n"
    "diffusers.DiffusionPipeline, diffusers.AutoencoderDC, transformers.BertModel",
}


def seconds(command: list[str], own: dict[str, str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="emoji")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    torch = environment("torch", options.threads)
    beside = str(Path(__file__).with_name("torch_pipeline.py"))
    with tempfile.TemporaryDirectory() as folder:
        common = ["--seed", "1", "--steps", str(options.steps), "-m", options.model]
        commands: dict[str, tuple[list[str], dict[str, str]]] = {}
        for name in options.backend.split(","):
            out = ["-o", str(Path(folder) / f"{name}.png"), "--backend", name]
            command = [sys.executable, "-c", RUN, "image", PROMPT, *common, *out]
            commands[f"gentron-run on {name}"] = command, dict(os.environ)
        own = ["-o", str(Path(folder) / "torch.png"), "--threads", str(options.threads)]
        commands["torch and diffusers"] = [sys.executable, beside, PROMPT, *common, *own], torch
        for name, code in IMPORTS.items():
            commands[name] = [sys.executable, "-c", code], torch
        for command, environ in commands.values():  # engines into the cache, files into memory
            seconds(command, environ)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(options.rounds):
            names = list(commands)
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                times[name].append(seconds(*commands[name]))
    rows = [row_of(name, found, times["torch and diffusers"]) for name, found in times.items()]
    title = f"{options.model}, process start to PNG, {options.steps} steps, {options.rounds} rounds"
    machine = machine_facts()
    sys.stdout.write(f"{title} in turn; {machine['cpu']}, {machine['cores']} cores\n\n")
    sys.stdout.write("| process | median | fastest | share of torch and diffusers |\n")
    sys.stdout.write("|---|---|---|---|\n" + "\n".join(map(line_of, rows)) + "\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def row_of(name: str, found: list[float], whole: list[float]) -> dict[str, Any]:
    shares = [mine / theirs for mine, theirs in zip(found, whole, strict=True)]
    return {
        "name": name,
        "median_s": statistics.median(found),
        "min_s": min(found),
        "share": statistics.median(shares),
        "share_range": [min(shares), max(shares)],
    }


def line_of(row: dict[str, Any]) -> str:
    low, high = row["share_range"]
    times = f"{row['median_s']:.2f} s | {row['min_s']:.2f} s"
    return f"| {row['name']} | {times} | {row['share']:.2f} ({low:.2f} to {high:.2f}) |"


if __name__ == "__main__":
    main()
