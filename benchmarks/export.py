"""What tracing a component costs: seconds and peak memory at full size, and growth with depth.

    python benchmarks/export.py [--depths 4,8,16] [--full] [--json FILE]

Every measurement is a process of its own that imports torch, traces one component in float16,
optimises the graph, links it to its weights and saves it. The weights' files are there but empty
(sparse), because tracing reads none of them; checking the graphs does, and `gentron-export` prints
what that took. `--full` adds the components of `xl2` and `g2`, T5-XXL among them: several minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

FULL = (
    ("xl2", "denoiser"),
    ("xl2", "conditioner"),
    ("xl2", "text_encoder_2"),
    ("g2", "text_projection"),
    ("g2", "conditioner"),
    ("g2", "denoiser"),
    ("g2-video", "denoiser"),
)


def measure(preset_name: str, component: str, depth: int) -> dict[str, object]:
    """Traces here and now; call it in a fresh process. `depth` 0 is the preset's own."""
    started = time.perf_counter()
    import onnx_ir as ir
    import torch

    from gentron.export.component import peak_bytes, stored_values
    from gentron.export.components import Source, parts
    from gentron.export.link import WeightMap
    from gentron.export.tracing import Traceable, trace
    from gentron.presets import preset
    from gentron.weights import StoredTensor

    imported = time.perf_counter()
    before = peak_bytes()
    spec = preset(preset_name)
    transformer = replace(spec.transformer, depth=depth) if depth else spec.transformer
    part = parts(Source(transformer, spec.encoders, spec.vae, spec.scheduler))[component]
    with torch.device("meta"):
        module = part.build()
    with tempfile.TemporaryDirectory() as folder:
        file, end = Path(folder) / "weights.safetensors", 0
        tensors = {}
        for name, value in stored_values(module):
            length = value.numel() * 2
            tensors[name] = StoredTensor(file, end, length, "F16", tuple(value.shape))
            end += length
        with file.open("wb") as stream:
            stream.truncate(end)
        traceable = Traceable(part.component, part.build, part.side_unit)
        model = trace(traceable, "float16", WeightMap(tensors, Path(folder)))
        graph = Path(folder) / "graph.onnx"
        ir.save(model, graph)
        size = graph.stat().st_size
    return {
        "preset": preset_name,
        "component": component,
        "depth": transformer.depth,
        "parameters": sum(value.numel() for value in module.parameters()),
        "nodes": len(list(model.graph)),
        "graph_bytes": size,
        "import_s": round(imported - started, 1),
        "trace_s": round(time.perf_counter() - imported, 1),
        "imported_gb": round(before / 1e9, 3),
        "peak_gb": round(peak_bytes() / 1e9, 3),
    }


def in_a_fresh_process(preset_name: str, component: str, depth: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--one", preset_name, component, str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{preset_name} {component}: {done.stderr.strip()}")
    row: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return row


def table(rows: list[dict[str, object]]) -> str:
    columns = ("preset", "component", "depth", "parameters", "nodes", "trace_s", "peak_gb")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(f"{row[c]:,}" if isinstance(row[c], int) else str(row[c])
                                for c in columns) + " |" for row in rows]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", default="4,8,16", help="of a g2 denoiser [4,8,16]")
    parser.add_argument("--full", action="store_true", help="also the presets' own depths")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--one", nargs=3, metavar=("PRESET", "COMPONENT", "DEPTH"),
                        help=argparse.SUPPRESS)  # fmt: skip
    options = parser.parse_args()
    if options.one:
        preset_name, component, depth = options.one
        sys.stdout.write(json.dumps(measure(preset_name, component, int(depth))) + "\n")
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    jobs = [("g2", "denoiser", int(depth)) for depth in options.depths.split(",")]
    jobs += [(*job, 0) for job in FULL if options.full]
    rows = []
    for job in jobs:
        rows.append(in_a_fresh_process(*job))
        sys.stderr.write(f"{job[0]} {job[1]} {rows[-1]['depth']}: {rows[-1]['trace_s']} s\n")
    sys.stdout.write(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores\n\n")
    sys.stdout.write(table(rows) + "\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
