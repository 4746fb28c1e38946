"""Where the time of a step goes: by kind of operation, as OpenVINO's own counters say.

    python benchmarks/layers.py [-m xl2] [--size 256x256] [--precision bf16] [--runs 5]

Counting slows small operations down, so shares matter here and not sums. Beside each kind stands
what it does, for those that are matrix products also how fast.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from typing import Any

from gentron.bench.machine import machine_facts
from gentron.bench.temporary import find_bundle
from gentron.bench.work import request_of, stage_work
from gentron.engines import bundle_graph
from gentron.engines.openvino_engine import HINT, HINTS, openvino_core
from gentron.probe import in_compute_type, probe_inputs


def counted_request(options: argparse.Namespace) -> Any:
    width, _, height = options.size.partition("x")
    bundle = find_bundle(options.model, ["step"], lambda line: sys.stderr.write(line + "\n"))
    request = request_of(bundle, size=(int(width), int(height)), frames=options.frames)
    (call,) = stage_work(bundle, "step", request).calls
    component = bundle.components[call.component]
    core = openvino_core()
    model = core.read_model(str(bundle_graph(bundle, call.component, "fp32").file))
    feeds = in_compute_type(component, probe_inputs(component, call.case), "float32")
    model.reshape({name: list(values.shape) for name, values in feeds.items()})
    settings = {HINT: HINTS[options.precision], "NUM_STREAMS": 1, "PERF_COUNT": True}
    infer = core.compile_model(model, "CPU", settings).create_infer_request()
    for name, values in feeds.items():
        infer.get_tensor(name).data[:] = values
    return infer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="xl2")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    infer = counted_request(options)
    infer.infer()
    runs: list[dict[tuple[str, str], float]] = []
    counts: dict[tuple[str, str], int] = {}
    for _ in range(options.runs):
        infer.infer()
        found: dict[tuple[str, str], float] = defaultdict(float)
        counts = defaultdict(int)
        for layer in infer.profiling_info:
            key = (layer.node_type, layer.exec_type)
            found[key] += layer.real_time.total_seconds()
            counts[key] += 1
        runs.append(found)
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    whole = sum(middle.values())
    machine = machine_facts()
    sys.stdout.write(f"{options.model} at {options.size} in {options.precision}: {whole:.3f} s; ")
    sys.stdout.write(f"{machine['cpu']}, {machine['cores']} cores\n\n")
    sys.stdout.write("| operation | how | count | seconds | share |\n|---|---|---|---|---|\n")
    for (kind, how), seconds in sorted(middle.items(), key=lambda item: -item[1]):
        if seconds / whole >= 0.001:
            cells = [kind, how, str(counts[kind, how]), f"{seconds:.4f}", f"{seconds / whole:.1%}"]
            sys.stdout.write("| " + " | ".join(cells) + " |\n")


if __name__ == "__main__":
    main()
