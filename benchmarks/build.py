"""What compiling a bundle takes: seconds, peak memory and plan size of each component.

    python benchmarks/build.py BUNDLE [--backend tensorrt-rtx] [--component NAME ...] [--json FILE]

Every component is compiled in a process of its own, one after the other, for the default profile,
and the plan is thrown away. Peak memory is that of the process, with the weights that it maps.
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
from pathlib import Path

from gentron.engines.trt_flavor import FLAVORS

KINDS = 4  # most frequent kinds of layers, in the table
COLUMNS = ("component", "weights", "seconds", "peak memory", "plan", "layers", "16 bits", "kinds")


def measure(folder: Path, component: str, backend: str, precision: str, scratch: Path) -> None:
    """Compiles here and now and prints a row as JSON; call it in a fresh process."""
    from gentron.bundle import Bundle
    from gentron.engines.compiler import Job
    from gentron.engines.graphs import bundle_graph
    from gentron.engines.trt_build import TensorRtCompiler
    from gentron.errors import GenTronError

    try:
        graph = bundle_graph(Bundle.open(folder, verify="sizes"), component, precision)
        compiler, job = TensorRtCompiler(backend), Job(graph, precision, graph.profiles)
        compiler.check(job)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=scratch) as made:
            facts = compiler.compile(job, Path(made), _show)
        row = {"component": component, "total_s": time.perf_counter() - started, **facts}
        row["version"] = compiler.identity(job)["version"]
    except GenTronError as error:
        row = {"component": component, "error": str(error)}
    sys.stdout.write(json.dumps(row) + "\n")


def _show(doing: str, share: float) -> None:
    sys.stderr.write(f"\r{share:4.0%} {doing:40.40}")


def in_a_fresh_process(component: str, options: argparse.Namespace) -> dict[str, object]:
    command = [sys.executable, __file__, str(options.bundle), "--one", component]
    command += ["--backend", options.backend, "--precision", options.precision]
    command += ["--scratch", str(options.scratch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    sys.stderr.write("\n")
    if done.returncode:
        return {"component": component, "error": f"the process ended with {done.returncode}"}
    row: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return row


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in rows])


def _cells(row: dict) -> list[str]:
    if "error" in row:
        return [row["component"], row["error"], *[""] * (len(COLUMNS) - 2)]
    kinds = [f"{count} {kind}" for kind, count in list(row["layer_kinds"].items())[:KINDS]]
    return [
        row["component"],
        _size(row["weight_bytes"]),
        f"{row['total_s']:.1f}",
        _size(row["peak_host_bytes"] or 0),
        _size(row["plan_bytes"]),
        str(row["layers"]),
        f"{row['share_of_products']:.1%}",
        ", ".join(kinds),
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=sorted(FLAVORS), default="tensorrt-rtx")
    parser.add_argument("--component", action="append", help="one or more; all by default")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()),
                        help="folder with room for the largest plan")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.bundle, options.one, options.backend, options.precision, options.scratch)
        return
    from gentron.bundle import Bundle

    names = options.component or list(Bundle.open(options.bundle, verify="sizes").components)
    rows = [in_a_fresh_process(name, options) for name in names]
    versions = {str(row["version"]) for row in rows if "version" in row}
    sys.stdout.write(f"{options.backend} {', '.join(versions)} in {options.precision}; ")
    sys.stdout.write(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores\n\n")
    sys.stdout.write(table(rows) + "\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
