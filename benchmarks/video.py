"""What a step of a video costs beside a step of as many images, and what the temporal layer takes.

    python benchmarks/video.py BUNDLE [--images BUNDLE] [--frames 1,2,4,8,16] [--json FILE]

One video of F frames against F images in one batch, with the same rows each (text and no text), in
turns, so that both see the same machine; medians over all steps but the first of each shape. With
`--images`, a bundle of the same model without temporal layers, such as `emoji` for `emoji-video`,
the difference is what the temporal layers take. Counted beside it: their share of the operations.
The text tables are those that the loop really holds; repeated for every frame they would be F times
as large.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gentron.errors import GenTronError
from gentron.runtime import Pipeline
from gentron.runtime.cost import denoiser_cost
from gentron.runtime.result import machine

PROMPT = "a red car moving right"
STEPS = 3  # of each turn


def step_times(pipe: Pipeline, **options: int | float) -> tuple[list[float], int]:
    """Seconds of each step but the first, and the bytes of the text tables."""
    generation = pipe.stream(PROMPT, seed=0, steps=STEPS, guidance=4.0, **options)
    times = [step.seconds for step in generation]
    tables = generation._loop.tables
    text = [b for name, b in tables.items() if name.startswith("text_")]
    return times[1:], sum(buffer.read().nbytes for buffer in text)


def decode_time(pipe: Pipeline, frames: int) -> float:
    """Seconds a frame."""
    result = pipe(PROMPT, seed=0, steps=1, frames=frames)
    (stage,) = (stage for stage in result.stages if stage.stage == "decode")
    return stage.seconds / frames


def measure(pipe: Pipeline, twin: Pipeline | None, frames: int, rounds: int) -> dict[str, float]:
    """One row: milliseconds a step."""
    ways: dict[str, Callable[[], tuple[list[float], int]]] = {
        "video": lambda: step_times(pipe, frames=frames, motion=1.0),
        "guided": lambda: step_times(pipe, frames=frames, motion=1.2),
        "images": lambda: step_times(pipe, batch=frames),
    }
    if twin is not None:
        ways["twin"] = lambda: step_times(twin, batch=frames)
    times: dict[str, list[float]] = {name: [] for name in ways}
    table_bytes = 0
    for turn in range(rounds + 1):
        for name, way in ways.items():
            found, size = way()
            if turn:  # the first warms up
                times[name] += found
            if name == "video":
                table_bytes = size
    row = {name: 1000 * statistics.median(values) for name, values in times.items()}
    return {"frames": frames, **row, "text_bytes": table_bytes}


def counted_share(pipe: Pipeline, frames: int) -> float:
    """Of a step's operations, those of the temporal layers."""
    config, sizes = pipe.bundle.config, {"B": 1, "R": 2, "F": frames}
    sizes |= {"h": config.sample_height, "w": config.sample_width}
    whole = denoiser_cost(config, sizes, 4).flops
    return 1 - denoiser_cost(replace(config, temporal=False), sizes, 4).flops / whole


def table(rows: list[dict[str, float]], has_twin: bool) -> str:
    header = ["frames", "video, ms a step", "as many images", "of that", "with motion-free row"]
    header += ["images without temporal layers", "temporal layers took"] * has_twin
    header += ["temporal, counted", "text tables, KB", "if repeated, KB"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---:|" * len(header)]
    for row in rows:
        cells = [f"{row['frames']:.0f}", f"{row['video']:.1f}", f"{row['images']:.1f}",
                 f"{row['video'] / row['images']:.2f}", f"{row['guided']:.1f}"]  # fmt: skip
        if has_twin:
            cells += [f"{row['twin']:.1f}", f"{100 * (1 - row['twin'] / row['video']):.0f} %"]
        cells += [f"{100 * row['counted_share']:.1f} %", f"{row['text_bytes'] / 1000:.0f}",
                  f"{row['frames'] * row['text_bytes'] / 1000:.0f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="of videos")
    parser.add_argument("--images", help="bundle of the same model without temporal layers")
    parser.add_argument("--frames", default="1,2,4,8,16", help="[1,2,4,8,16]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each [5]")
    parser.add_argument("--backend", help="[the first that runs here]")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    try:
        pipe = Pipeline.load(options.bundle, backend=options.backend)
        twin = Pipeline.load(options.images, backend=options.backend) if options.images else None
        rows = []
        for frames in map(int, options.frames.split(",")):
            rows.append(measure(pipe, twin, frames, options.rounds))
            rows[-1]["counted_share"] = counted_share(pipe, frames)
            sys.stderr.write(f"{frames} frames: {rows[-1]['video']:.1f} ms a step\n")
        decode = decode_time(pipe, min(8, pipe.bundle.config.max_frames))
    except GenTronError as error:
        raise SystemExit(f"error: {error}") from error
    sys.stdout.write(f"{machine()}, {os.cpu_count()} cores, {pipe.backend.describe()}\n\n")
    sys.stdout.write(table(rows, twin is not None) + "\n\n")
    sys.stdout.write(f"decoding takes {1000 * decode:.1f} ms a frame, one frame at a time\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
