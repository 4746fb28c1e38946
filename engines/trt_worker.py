"""`python -m gentron.engines.trt_worker`: one build in a process of its own.

Builders hold several times the weights and cannot be interrupted in the middle of a step. A process
can be killed at once, if the system runs out of memory it takes this one, and what goes wrong in a
native library stays in it.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gentron.engines.host_memory import peak_bytes
from gentron.isolated import Watch, run_isolated, serve

if TYPE_CHECKING:
    from gentron.engines.compiler import Facts, Job, Report
    from gentron.engines.trt_build import TensorRtCompiler

LOG = "build.log"


def build_isolated(compiler: TensorRtCompiler, job: Job, folder: Path, report: Report) -> Facts:
    """As `compiler.build`. Raises what it raises, ResourceError if its process was killed."""
    # Between two processes of ours, through a pipe: nothing that lies in a file is unpickled.
    names = ("workspace", "level", "strip", "device")
    options = {name: getattr(compiler, name) for name in names}
    payload = pickle.dumps((compiler.backend, options, job, folder))
    done = run_isolated(
        job.graph.component.name,
        "gentron.engines.trt_worker",
        [],
        folder / LOG,
        lambda doing, share, _: report(doing, share),
        payload=payload,
    )
    facts: Facts = done.result
    return facts


def work(payload: bytes, watch: Watch) -> Any:
    from gentron.engines.trt_build import TensorRtCompiler

    backend, options, job, folder = pickle.loads(payload)
    compiler = TensorRtCompiler(backend, **options)
    if compiler.device:  # which TensorRT tunes its kernels on: the current one
        from cuda.core import Device

        Device(compiler.device).set_current()
    return compiler.build(job, folder, lambda doing, share: watch(doing, share, peak_bytes() or 0))


if __name__ == "__main__":
    sys.exit(serve(work))
