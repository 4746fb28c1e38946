"""The backends `tensorrt` and `tensorrt-rtx`: engines from the store, proved, on one GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gentron.engines.base import Backend, Engine, Graph
from gentron.engines.compiler import Compiler, Facts, Job
from gentron.engines.device import Device
from gentron.engines.device_buffers import Arena
from gentron.engines.device_cuda import CudaDevice, driver_missing, is_installed
from gentron.engines.options import EngineOptions
from gentron.engines.proof import prove_profiles
from gentron.engines.store import EngineKey, Entry, StaleEngineError
from gentron.engines.trt_build import PLAN, TensorRtCompiler
from gentron.engines.trt_engine import TensorRtEngine
from gentron.engines.trt_flavor import FLAVORS, Flavor
from gentron.engines.trt_inspect import check_kernels
from gentron.engines.trt_kernels import KernelFile
from gentron.engines.trt_log import Messages, logger_for, require
from gentron.engines.trt_plan import Plan, TensorRt
from gentron.errors import BackendError

TURING = (7, 5)  # the oldest that TensorRT 10 and 11 know


def missing(flavor: Flavor) -> str:
    """Everything that is not there, in one line; imports nothing large to find out."""
    found = []
    if not any(is_installed(name) for name in flavor.modules):
        found.append(f"{flavor.title} is not installed (pip install 'gentron[{flavor.extra}]')")
    if not is_installed("cuda.core"):
        found.append(f"cuda.core is not installed (pip install 'gentron[{flavor.extra}]')")
    if absent := driver_missing():
        found.append(absent)
    return "; ".join(found)


def unsupported(flavor: Flavor, device: Device) -> str:
    """Why that GPU is not for this backend, or nothing."""
    generation = "sm{}{}".format(*device.capability)
    if flavor.cross_compiles and not flavor.runs_on((), device.capability):
        return (
            f"{flavor.title} does not run on {device.name} ({generation}); use --backend tensorrt"
        )
    if device.capability < TURING:
        return f"{flavor.title} needs a GPU of sm75 or later, and {device.name} is {generation}"
    return ""


class TensorRtBackend(Backend):
    """One GPU, one stream, one arena of memory for all engines."""

    # Not bf16: numpy has no arrays of this type to feed it.
    precisions = ("fp16", "fp32")
    exact_shapes = True  # captured work is of one shape

    def __init__(
        self,
        name: str,
        options: EngineOptions | None = None,
        *,
        device: Callable[[], Device] | None = None,
        trt: Any = None,
        compiler: Compiler | None = None,
    ):
        """The keywords put something else in the place of CUDA, TensorRT and its builder."""
        flavor = FLAVORS[name]
        self.name, self._options, self._closed = name, options or EngineOptions(), False
        if device is None and (absent := missing(flavor)):
            raise BackendError(f"{name}: {absent}")
        trt = trt or flavor.load()
        self._compiler = compiler or TensorRtCompiler(name, device=self._options.device or 0)
        try:
            self._device = device() if device else CudaDevice(self._options.device or 0)
        except BackendError as error:
            raise BackendError(f"{name}: {error}") from error
        if reason := unsupported(flavor, self._device):
            self._device.close()
            raise BackendError(f"{name}: {reason}")
        self._arena = Arena(self._device)
        messages = Messages()
        self._logger = logger_for(trt, messages)
        with self._device.held():
            runtime = require(trt.Runtime(self._logger), "starting", messages, flavor.title)
        self._tensorrt: TensorRt | None = TensorRt(
            trt, runtime, messages, str(trt.__version__), self._logger
        )
        self._title = flavor.title

    def describe(self) -> str:
        generation = "sm{}{}".format(*self._device.capability)
        return f"{self._title} {self._running.version}, {self._device.name} ({generation})"

    def load(self, graph: Graph, precision: str) -> Engine:
        assert graph.precision == self.graph_precision(precision)
        assert graph.digest, "an engine is found again by its graph's digest"
        (job,) = self._compiler.jobs(graph, precision, self._options.targets)
        entry, engine = self._obtain(job)
        if not entry.fresh:
            try:
                engine = self._open(job, entry.file(PLAN), _is_stripped(entry.key))
            except StaleEngineError as error:
                self._options.store.reject(entry, str(error))
                entry, engine = self._obtain(job)
                engine = engine or self._open(job, entry.file(PLAN), _is_stripped(entry.key))
            if "probes" not in entry.facts:  # compiled where it could not run
                self._options.store.proved(entry, self._proved(engine, job))
        assert engine is not None
        return engine

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._arena.close()
            self._tensorrt = None  # the runtime, after all engines
            self._device.close()

    @property
    def _running(self) -> TensorRt:
        if self._tensorrt is None:
            raise BackendError(f"{self.name}: used after close(); load again")
        return self._tensorrt

    def _obtain(self, job: Job) -> tuple[Entry, TensorRtEngine | None]:
        """With the engine itself if it was built just now: it was loaded for its proof."""
        proven: list[TensorRtEngine] = []

        def prove_files(folder: Path) -> Facts:
            engine, facts = self._prove(job, folder)
            proven.append(engine)
            return facts

        report = self._options.reporting(job.graph.component.name)
        entry = self._options.store.obtain(job, self._compiler, report, prove_files)
        return entry, proven[0] if proven else None

    def prove(self, job: Job, folder: Path) -> Facts:
        """Loads the plan in `folder`, and lets it compute the golden probes; raises BackendError
        where it does not."""
        engine, facts = self._prove(job, folder)
        engine.close()
        return facts

    def _prove(self, job: Job, folder: Path) -> tuple[TensorRtEngine, Facts]:
        stripped = _is_stripped(EngineKey.of(job, self._compiler))
        engine = self._open(job, folder / PLAN, stripped)
        return engine, self._proved(engine, job)

    def _open(self, job: Job, file: Path, stripped: bool) -> TensorRtEngine:
        running = self._running
        kernels = KernelFile(EngineKey.of(job, self._compiler).name, self.describe())
        with self._device.held():
            plan = Plan(running, file, job.graph.component, job.graph.compute, self._arena, kernels,
                        weights=job.graph.file if stripped else None)  # fmt: skip
            info = (self.name, self._device.name, running.version)
            return TensorRtEngine(job.graph, job.precision, plan, self._arena, info)

    def _proved(self, engine: TensorRtEngine, job: Job) -> Facts:
        """Its kernels, and in every profile the probes that it allows."""
        try:
            kernels = engine.inspect()
            check_kernels(kernels, job.precision, job.graph.component.name)
            facts = prove_profiles(engine, job.graph, job.precision, engine.profiles)
        except BaseException:
            engine.close()
            raise
        return facts | {"kernels": kernels}


def prover_here(
    compiler: TensorRtCompiler, job: Job, backend: Callable[..., TensorRtBackend] = TensorRtBackend
) -> Callable[[Path], Facts] | None:
    """Proves a fresh plan, where the GPU that it is for is in this machine; None elsewhere."""
    if missing(compiler.flavor) or compiler.refusal(compiler.identity(job), job.targets):
        return None

    def prove_files(folder: Path) -> Facts:
        running = backend(compiler.backend, compiler=compiler)
        with running:
            return running.prove(job, folder)

    return prove_files


def _is_stripped(key: EngineKey) -> bool:
    return bool(key.identity.get("stripped"))
