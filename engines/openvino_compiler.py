"""OpenVINO's compiled models as files: a quarter to a half of the time of compiling them again.

Weights are in these files. Leaving them out (CACHE_MODE OPTIMIZE_SIZE) works only for weights in
OpenVINO's own format, not for those that an ONNX graph reads from the files beside it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from gentron.engines.base import Graph
from gentron.engines.compiler import Compiler, Facts, Job, Report
from gentron.engines.host_memory import available_bytes, give_back
from gentron.engines.machine import cpu_name
from gentron.engines.openvino_engine import (
    INT8,
    NAME,
    Model,
    OpenVinoCpu,
    OpenVinoEngine,
    fixed_shape,
)
from gentron.engines.openvino_int8 import GROUP, nncf_version
from gentron.engines.options import EngineOptions
from gentron.engines.proof import prove
from gentron.engines.shapes import Profile
from gentron.errors import RequestError, ResourceError
from gentron.probe import load_probes

BLOB = "engine.blob"
PEAK = 2.2  # memory to compile and export over that of float32 weights; 2.1 measured
GRAPH = "without lone softmaxes"  # what was done to it before it was compiled
# Nine tenths of a picture's time, where rounding costs 0.4 % of the range. The others run once for
# a text or a picture and stay float32: rounded timesteps have other sines, which moves modulation
# rows by up to 17 % of their range, text embeddings move by up to 10 %, pixels by 0.7 %.
BFLOAT16 = ("denoiser",)


class FileOnly(io.BytesIO):
    """What OpenVINO exports to: it asks for a BytesIO and hands over piece by piece, which all of
    a model's weights need not wait for in memory."""

    def __init__(self, file: BinaryIO):
        super().__init__()
        self._file = file

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()


class OpenVinoCompiler(Compiler):
    """Writes compiled models, weights included, each for one shape."""

    backend = NAME

    def __init__(self, options: EngineOptions, device: OpenVinoCpu | None = None):
        self.device = device or OpenVinoCpu(options.threads)
        self.precisions = self.device.precisions
        self.on_request = (INT8,)

    def graph_precision(self, precision: str) -> str:
        super().graph_precision(precision)
        return "fp32"

    def jobs(self, graph: Graph, precision: str, targets: Sequence[str] = ()) -> list[Job]:
        """One for the usual sizes of each profile."""
        found: list[Job] = []
        for profile in graph.profiles:
            usual = {axis: sizes.usual for axis, sizes in profile.items()}
            job = self.job(graph, precision, fixed_shape(graph.component, usual), targets)
            if job not in found:
                found.append(job)
        return found

    def job(self, graph: Graph, precision: str, shape: Profile, targets: Sequence[str] = ()) -> Job:
        """For one shape; its precision is what the component will really compute in."""
        computed = precision if graph.component.name in BFLOAT16 else "fp32"
        graph = replace(graph, profiles=(shape,), flexible=False)
        return Job(graph, computed, (shape,), tuple(targets))

    def prover(self, job: Job) -> Callable[[Path], Facts]:
        return lambda folder: self.prove(job, self.device.load(folder / BLOB, job.precision))

    def prove(self, job: Job, model: Model) -> Facts:
        """Replays the golden probes that lie within the job's shape; raises BackendError."""
        (shape,) = job.profiles
        engine = OpenVinoEngine(
            job.graph, job.precision, self.device.version, lambda sizes: model, lambda: None
        )
        facts = prove(engine, job.graph, job.precision, shape)
        return facts if facts["probes"]["passed"] else {"probes": "none of these shapes"}

    def compiled(self, job: Job, shape: Profile) -> Model:
        """In memory; raises BackendError where weights of 8 bits cost too much, which is found out
        in the shape of a golden probe if the job's own holds none."""
        if job.precision == INT8 and job.graph.probes:
            case, _ = load_probes(job.graph.probes)[0]
            probed = fixed_shape(job.graph.component, case.sizes)
            if probed != shape:
                there = replace(job, profiles=(probed,))
                self.prove(there, self.device.compile(job.graph, probed, INT8))
        return self.device.compile(job.graph, shape, job.precision)

    def identity(self, job: Job) -> Mapping[str, Any]:
        options = {"hint": self.device.hint(job.precision), "threads": self.device.threads,
                   "graph": GRAPH}  # fmt: skip
        if job.precision == INT8:
            options |= {"weights": INT8, "nncf": nncf_version(), **GROUP}
        return self._machine() | options

    def refusal(self, identity: Mapping[str, Any], targets: Sequence[str]) -> str:
        if targets:
            return f"built for {', '.join(targets)}, which are not CPUs"
        return "; ".join(
            f"its {name} is {identity.get(name)}, here it is {here}"
            for name, here in self._machine().items()
            if identity.get(name) != here
        )

    def check(self, job: Job) -> None:
        if job.targets:
            raise RequestError("gpu", f"{NAME} compiles for this CPU; leave --gpu out")
        needed, free = int(PEAK * self.device.weights(job.graph)), available_bytes()
        if free is not None and needed > free:
            raise ResourceError(
                f"{NAME}: compiling {job.graph.component.name} needs about {needed / 1e9:.1f} GB "
                f"of memory, {free / 1e9:.1f} GB are free; close other programs, or build on a "
                "machine with more"
            )

    def compile(self, job: Job, folder: Path, report: Report) -> Facts:
        (shape,) = job.profiles
        report("compiling", 0.0)
        started = time.monotonic()
        model = self.compiled(job, shape)
        seconds = time.monotonic() - started
        report("writing", 0.8)
        with (folder / BLOB).open("wb") as file:
            model.compiled.export_model(FileOnly(file))
        del model
        give_back()  # before it is imported for its proof
        return {"compile_seconds": round(seconds, 3)}

    def _machine(self) -> dict[str, Any]:
        device = self.device
        return {
            "version": device.version,
            "cpu": f"{device.name}, {cpu_name()}",
            "capabilities": " ".join(device.capabilities),
        }
