"""What this machine could do at most: its processor, and the largest matrix products it reaches.

The peak is measured as one more contender, in the same rounds, so that a share of it means the same
whatever the machine's speed was at the time.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gentron.bench.flops import stage_flops
from gentron.bench.runner import Runner
from gentron.bench.work import Work
from gentron.engines.openvino_engine import HINT, HINTS, openvino_core
from gentron.errors import RequestError

SIDE = 2048  # of the constant factor
ROWS = (256, 1024)  # of the other; the best is taken
CHAIN = 4  # products one after the other, so that converting the ends counts for little
TRIES = 2


class GemmRunner(Runner):
    """Products of large matrices in the work's precision, by whatever does them fastest here."""

    def __init__(self, work: Work):
        """Raises RequestError where nothing here computes products in this precision."""
        candidates = list(_candidates(work))
        if not candidates:
            raise RequestError(
                "precision",
                f"nothing here multiplies in {work.precision} (pip install 'gentron[openvino]')",
            )
        best = 0.0
        for label, flops, run in candidates:
            run()
            rate = max(flops / _seconds(run) for _ in range(TRIES))
            if rate > best:
                best, self._run = rate, run
                self.facts = {"label": label, "flops": flops, "precision": work.precision}
        counted, how = stage_flops(work)
        self.facts |= {"graph_flops": counted, "counted": how, "device": "cpu", "versions": {}}

    def run(self) -> None:
        self._run()


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _candidates(work: Work) -> Any:
    """(label, operations, function)."""
    for rows in ROWS:
        flops = 2.0 * CHAIN * rows * SIDE * SIDE
        if work.precision == "fp32":
            yield f"numpy {np.__version__}, {rows} rows", flops, _numpy(rows)
        if work.precision in HINTS and (run := _openvino(rows, work)) is not None:
            yield f"OpenVINO, {CHAIN} products of {rows} x {SIDE} x {SIDE}", flops, run


def _numpy(rows: int) -> Callable[[], None]:
    left, right = np.ones((rows, SIDE), np.float32), np.full((SIDE, SIDE), 1 / SIDE, np.float32)
    out = np.empty_like(left)

    def run() -> None:
        for _ in range(CHAIN):
            np.matmul(left, right, out=out)

    return run


def _openvino(rows: int, work: Work) -> Callable[[], None] | None:
    try:
        import openvino
        from openvino import opset13 as ops
    except ImportError:
        return None
    given = ops.parameter([rows, SIDE], np.float32)
    value = given
    for index in range(CHAIN):
        factor = np.random.default_rng(index).normal(0, SIDE**-0.5, (SIDE, SIDE))
        value = ops.matmul(value, ops.constant(factor.astype(np.float32)), False, False)
    settings: dict[str, Any] = {HINT: HINTS[work.precision], "NUM_STREAMS": 1}
    settings |= {"INFERENCE_NUM_THREADS": work.threads} if work.threads else {}
    core = openvino_core()
    if work.precision == "bf16" and "BF16" not in core.get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        return None
    request = core.compile_model(
        openvino.Model([value], [given]), "CPU", settings
    ).create_infer_request()
    request.get_input_tensor().data[:] = np.random.default_rng(9).normal(size=(rows, SIDE))
    return request.infer  # type: ignore[no-any-return]


def physical_cores() -> int:
    """Cores that this process may use, counting those that share one once."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pairs: set[tuple[str, str]] = set()
    file = Path("/proc/cpuinfo")
    if file.exists():
        for block in file.read_text().split("\n\n"):
            split = (line.partition(":") for line in block.splitlines() if ":" in line)
            facts = {name.strip(): value.strip() for name, _, value in split}
            if "core id" in facts:
                pairs.add((facts.get("physical id", "0"), facts["core id"]))
    return max(1, min(allowed or 1, len(pairs) or (allowed or 1)))


def machine_facts() -> dict[str, Any]:
    """Processor, its instruction sets that matter here, cores and memory."""
    file, flags, model, memory = Path("/proc/cpuinfo"), "", platform.processor(), 0
    if file.exists():
        lines = [line.partition(":") for line in file.read_text().splitlines()]
        facts = {name.strip(): value.strip() for name, _, value in lines}
        family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
        model = f"{facts.get('model name', model)} ({family})"
        flags = facts.get("flags", facts.get("Features", ""))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16")
    return {
        "cpu": model,
        "instructions": [name for name in wanted if name in flags.split()],
        "cores": physical_cores(),
        "memory_bytes": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
