"""ONNX Runtime's graph optimisations ahead of time: constants folded, layouts chosen for this CPU.

Never needed, because a session does the same when it loads; it saves that time at every start, at
the price of a second copy of the weights, in the type that they are computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from gentron.engines.base import Graph
from gentron.engines.compiler import Compiler, Facts, Job, Report
from gentron.engines.machine import cpu_name
from gentron.engines.onnxruntime_cpu import (
    CPU,
    OPTIMISED,
    OnnxRuntimeEngine,
    import_onnxruntime,
)
from gentron.engines.options import EngineOptions
from gentron.engines.proof import prove
from gentron.errors import BackendError, RequestError

WEIGHTS = "engine.weights"
INLINE = 1024  # bytes up to which a constant stays in the graph


class OnnxRuntimeCompiler(Compiler):
    backend = "onnxruntime"
    precisions = ("fp32", "fp16")

    def __init__(self, options: EngineOptions):
        self._threads = options.threads
        self._version = str(import_onnxruntime().__version__)

    def jobs(self, graph: Graph, precision: str, targets: Sequence[str] = ()) -> list[Job]:
        return [Job(graph, precision, (), tuple(targets))]  # one engine for every shape

    def identity(self, job: Job) -> Mapping[str, Any]:  # noqa: ARG002
        return {"version": self._version, "cpu": cpu_name()}

    def refusal(self, identity: Mapping[str, Any], targets: Sequence[str]) -> str:  # noqa: ARG002
        if identity.get("version") != self._version:
            return f"made by onnxruntime {identity.get('version')}, here is {self._version}"
        if identity.get("cpu") != cpu_name():
            return f"made for {identity.get('cpu')}, here is {cpu_name()}"
        return ""

    def check(self, job: Job) -> None:
        if job.targets:
            raise RequestError("gpu", "onnxruntime compiles for this CPU; leave --gpu out")

    def compile(self, job: Job, folder: Path, report: Report) -> Facts:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(folder / OPTIMISED)
        entries = {
            "session.optimized_model_external_initializers_file_name": WEIGHTS,
            "session.optimized_model_external_initializers_min_size_in_bytes": str(INLINE),
        }
        for name, value in entries.items():
            options.add_session_config_entry(name, value)
        report("optimising", 0.0)
        try:
            ort.InferenceSession(str(job.graph.file), options, providers=[CPU])
        except Exception as error:  # ONNX Runtime's own classes share no useful base
            raise BackendError(
                f"onnxruntime: {job.graph.component.name} ({job.graph.file}): {error}"
            ) from error
        return {}

    def prover(self, job: Job) -> Callable[[Path], Facts]:
        def run(folder: Path) -> Facts:
            engine = OnnxRuntimeEngine(job.graph, self._threads, folder / OPTIMISED)
            with closing(engine):
                return prove(engine, job.graph, job.precision)

        return run
