"""The ahead-of-time compiler behind the backends `tensorrt` and `tensorrt-rtx`.

One graph becomes one plan. Everything that can be refused is refused from the parsed network,
before the builder starts; what the builder then says is in the error. Only TensorRT-RTX has been
built with here: TensorRT needs a GPU, and shares all of this but `trt_flavor` and `trt_device`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gentron.contract import Component
from gentron.engines.compiler import Compiler, Facts, Job, Report
from gentron.engines.host_memory import available_bytes, peak_bytes
from gentron.engines.shapes import FIELD as PROFILE_FIELD
from gentron.engines.shapes import Profile, tensor_shapes
from gentron.engines.trt_device import gpu_identity
from gentron.engines.trt_flavor import FIELD as TARGET_FIELD
from gentron.engines.trt_flavor import FLAVORS
from gentron.engines.trt_log import Messages, failure, logger_for, require
from gentron.engines.trt_network import (
    check_contract,
    check_precision,
    precision_facts,
    product_share,
    read_layers,
)
from gentron.engines.trt_progress import BuildProgress, make_monitor, run_reporting
from gentron.engines.trt_worker import build_isolated
from gentron.errors import BackendError, RequestError, ResourceError

log = logging.getLogger(__name__)

PLAN = "engine.plan"
RECIPE = 1  # raise it when the same inputs come to be built in another way
HEADER_BYTES = 64  # Runtime.engine_header_size
WORKSPACE_VARIABLE = "GENTRON_WORKSPACE_BYTES"
MEMORY_VARIABLE = "GENTRON_BUILD_BYTES"
LEVELS = range(6)  # builder_optimization_level

# What a build needs besides `BASE_BYTES`, in bytes per byte of weights. Measured with TensorRT-RTX
# 1.7: 1.3 (3.7 GB of weights) to 2.1 (0.8 GB) of its own, and once the weights, mapped from their
# file, which the system can drop but reads again and again; and once more where the plan is held
# instead of written while it is made.
BASE_BYTES = 600_000_000
FACTOR_STREAMED, FACTOR_HELD = 2.4, 3.2
WARNINGS = 5  # kept in the facts


@dataclass
class _Parsed:
    """A network and what has to live as long: the parser holds the mapped weights."""

    trt: Any
    messages: Messages
    builder: Any
    parser: Any
    network: Any
    facts: Facts


class TensorRtCompiler(Compiler):
    """Graphs into plans, in the precision of the graph: types are kept, never chosen."""

    precisions = ("fp16", "bf16", "fp32")

    def __init__(
        self, backend: str, *, workspace: int | None = None, level: int = 3, strip: bool = False,
        device: int = 0,
    ):  # fmt: skip
        """`strip` leaves the weights out of the plan: TensorRT's only. `workspace` in bytes is what
        one kernel may use on the device: by default all memory, or $GENTRON_WORKSPACE_BYTES.
        `level` from 0 to 5: how long TensorRT searches. `device`: the GPU's number."""
        if backend not in FLAVORS:
            raise RequestError("backend", f"must be one of {', '.join(FLAVORS)}, got {backend!r}")
        if level not in LEVELS:
            raise RequestError("level", f"must be from 0 to 5, got {level}")
        self.backend = backend
        self.flavor = FLAVORS[backend]
        self.workspace = _bytes_from(WORKSPACE_VARIABLE) if workspace is None else workspace
        self.level, self.strip, self.device = level, strip, device

    def identity(self, job: Job) -> Mapping[str, Any]:
        """Raises BackendError without the module, or for TensorRT without a GPU."""
        values: dict[str, Any] = {
            "recipe": RECIPE,
            "version": self.flavor.load().__version__,
            "workspace": self.workspace,
            "level": self.level,
            "tf32": allows_tf32(job),
            "strict_nans": reports_nans(job),
            "stripped": self.strip,
        }
        if self.flavor.cross_compiles:
            return values | {"targets": list(self.flavor.targets(job.targets)) or ["portable"]}
        return values | {"device": self._device()}

    def _device(self) -> dict[str, Any]:
        gpu = gpu_identity(self.backend, self.flavor.extra, self.device)
        return {"name": gpu.name, "generation": gpu.generation, "driver": gpu.driver}

    def refusal(self, identity: Mapping[str, Any], targets: Sequence[str]) -> str:
        """Another driver is no reason: plans outlive it."""
        try:
            version = self.flavor.load().__version__
            gpu = gpu_identity(self.backend, self.flavor.extra, self.device)
        except BackendError as error:
            return str(error)
        if identity.get("version") != version:
            return (
                f"made by {self.flavor.title} {identity.get('version')}, and this machine has "
                f"{version}"
            )
        if self.flavor.cross_compiles:
            if not self.flavor.runs_on(targets, gpu.capability):
                made_for = ", ".join(targets) or "sm80 and later"
                return f"made for {made_for}, and the GPU here is {gpu.name} ({gpu.generation})"
            return ""
        made_for = identity.get("device", {})
        if (made_for.get("name"), made_for.get("generation")) != (gpu.name, gpu.generation):
            return (
                f"made for {made_for.get('name')} ({made_for.get('generation')}), and the GPU here "
                f"is {gpu.name} ({gpu.generation})"
            )
        return ""

    def check(self, job: Job) -> None:
        """Parses the graph, which maps its weights and copies none."""
        targets = self.flavor.targets(job.targets)
        check_profiles(job.graph.component, job.profiles)
        if self.strip and self.flavor.cross_compiles:
            raise RequestError(
                "strip",
                f"{self.flavor.title} makes plans without weights only where there is a GPU; leave "
                "--strip out, or use --backend tensorrt",
            )
        if not self.flavor.cross_compiles:
            gpu_identity(self.backend, self.flavor.extra, self.device)
        parsed = self._parse(job)
        name, products = job.graph.component.name, parsed.facts["products"]
        wide = {kind: products[kind] for kind in ("FLOAT", "BF16") if kind in products}
        if "sm75" in targets and wide:
            raise RequestError(
                TARGET_FIELD,
                f"sm75 (Turing) has no products of float32 or bfloat16 in {self.flavor.title}, and "
                f"{name} has {sum(wide.values())}; leave sm75 out",
            )
        check_memory(name, parsed.facts["weight_bytes"], self.flavor.streams(parsed.trt))

    def prover(self, job: Job) -> Callable[[Path], Facts] | None:
        from gentron.engines.trt_run import prover_here  # which builds with this module

        return prover_here(self, job)

    def compile(self, job: Job, folder: Path, report: Report) -> Facts:
        """Writes `engine.plan`, in a process of its own, which Ctrl-C kills."""
        return build_isolated(self, job, folder, report)

    def build(self, job: Job, folder: Path, report: Report) -> Facts:
        """As `compile`, in this process. The build runs in a thread; `report` is called from this
        one. Being stopped waits for the step that the builder is in."""
        progress = BuildProgress()
        return run_reporting(lambda: self._build(job, folder / PLAN, progress), progress, report)

    def _build(self, job: Job, plan: Path, progress: BuildProgress) -> Facts:
        started = time.monotonic()
        progress.doing("reading the graph")
        parsed = self._parse(job)
        read = time.monotonic()
        config = self._configure(job, parsed)
        monitor = make_monitor(parsed.trt, progress)
        config.progress_monitor = monitor  # which holds no reference
        try:
            with plan.open("xb") as file:
                self._write(job, parsed, config, file, progress)
            _check_header(plan, self.flavor.header, job.graph.component.name)
        except BaseException:
            plan.unlink(missing_ok=True)
            raise
        return {
            **parsed.facts,
            "share_of_products": round(product_share(parsed.facts, job.precision), 6),
            "plan_bytes": plan.stat().st_size,
            "peak_host_bytes": peak_bytes(),  # of the process, mapped weights included
            "seconds": {
                "reading": round(read - started, 3),
                "building": round(time.monotonic() - read, 3),
            },
            "warnings": list(parsed.messages.warnings)[-WARNINGS:],
        }

    def _parse(self, job: Job) -> _Parsed:
        """Raises BackendError for a graph that TensorRT or the contract does not accept."""
        trt, messages = self.flavor.load(), Messages()
        component, graph = job.graph.component, job.graph
        logger = logger_for(trt, messages)
        try:
            builder = trt.Builder(logger)
        except TypeError as error:  # a factory that returned nothing
            raise failure(messages, component.name, "starting the builder") from error
        network = builder.create_network(self.flavor.network_flags(trt))
        require(network, "creating a network", messages, component.name)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(graph.file)):
            raise _parse_error(parser, messages, job)
        check_contract(network, component, graph.compute)
        facts = precision_facts(read_layers(trt, network))
        check_precision(facts, job.precision, component.name)
        return _Parsed(trt, messages, builder, parser, network, facts)

    def _configure(self, job: Job, parsed: _Parsed) -> Any:
        trt, builder, component = parsed.trt, parsed.builder, job.graph.component
        config = builder.create_builder_config()

        def required(value: Any, what: str) -> Any:
            return require(value, what, parsed.messages, component.name)

        required(config, "configuring the builder")
        if self.workspace:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace)
        config.builder_optimization_level = self.level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names for the inspector
        if not allows_tf32(job):
            config.clear_flag(trt.BuilderFlag.TF32)
        if reports_nans(job):
            config.set_flag(trt.BuilderFlag.STRICT_NANS)
        if self.strip:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
            config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
        self.flavor.set_targets(trt, config, self.flavor.targets(job.targets), required)
        for sizes in job.profiles:
            profile = builder.create_optimization_profile()
            required(profile, "creating a profile")
            for name, shapes in tensor_shapes(component, sizes).items():
                profile.set_shape(name, *shapes)
            required(config.add_optimization_profile(profile), f"profile {_words(sizes)}")
        return config

    def _write(
        self, job: Job, parsed: _Parsed, config: Any, file: BinaryIO, progress: BuildProgress
    ) -> None:
        trt, builder, network = parsed.trt, parsed.builder, parsed.network
        if self.flavor.streams(trt):
            writer = make_writer(trt, file, progress, parsed.facts["weight_bytes"])
            built = builder.build_serialized_network_to_stream(network, config, writer)
        else:
            writer, built = None, builder.build_serialized_network(network, config)
        if progress.error is not None:
            raise progress.error
        if progress.cancelled:
            raise BackendError(f"{job.graph.component.name}: the build was stopped")
        require(
            built,
            "the build",
            parsed.messages,
            job.graph.component.name,
            profiles="; ".join(map(_words, job.profiles)),
            workspace=config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
        )
        if writer is None:
            file.write(memoryview(built))


def allows_tf32(job: Job) -> bool:
    """Whether float32 products may round their factors to 10 bits of mantissa, as float16 does.

    Only in a text encoder in 16 bits: its float32 islands are there for the range of numbers,
    which TF32 has. Those of the denoiser (guidance weights multiply rounding by more than ten) and
    of the conditioner (sines of large timesteps) are there for the digits; so is all of fp32.
    """
    return job.precision != "fp32" and job.graph.component.name.startswith("text_encoder")


def reports_nans(job: Job) -> bool:
    """Whether 0 * x, x - x and x / x keep what is not finite: the denoiser's `bad` looks for it."""
    return job.graph.component.name == "denoiser"


def check_profiles(component: Component, profiles: Sequence[Profile]) -> None:
    """TensorRT would notice only while building. Raises RequestError."""
    axes = {axis for spec in component.inputs for axis in spec.axes if isinstance(axis, str)}
    if not profiles and axes:
        raise RequestError(
            PROFILE_FIELD, f"{component.name} has free sizes ({_list(axes)}); give one profile"
        )
    for profile in profiles:
        if set(profile) != axes:
            raise RequestError(
                PROFILE_FIELD,
                f"{component.name} has the free sizes {_list(axes)}, and a profile for "
                f"{_list(set(profile))}",
            )


def check_memory(name: str, weights: int, streams: bool) -> None:
    """Raises ResourceError where a build needs more than there is, or $GENTRON_BUILD_BYTES."""
    factor = FACTOR_STREAMED if streams else FACTOR_HELD
    needed = BASE_BYTES + int(factor * weights)
    allowed = _bytes_from(MEMORY_VARIABLE) or available_bytes()
    if allowed is not None and needed > allowed:
        raise ResourceError(
            f"{name}: compiling it takes about {needed / 1e9:.1f} GB of memory ({factor} x "
            f"{weights / 1e9:.1f} GB of weights, and {BASE_BYTES / 1e9:.1f}), and "
            f"{allowed / 1e9:.1f} GB are available; compile it on a machine with more memory, "
            f"choose the others with --component, or set {MEMORY_VARIABLE} to allow it"
        )


def make_writer(trt: Any, file: BinaryIO, progress: BuildProgress, expected: int) -> Any:
    """An IStreamWriter that appends to a file of about `expected` bytes.

    TensorRT-RTX takes no notice of a short write: after a full disk, or Ctrl-C, it goes on to the
    end, nothing more is written, and the caller looks at `progress`.
    """

    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # of a module chosen at run time
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any, *_: Any) -> int:  # some versions pass the size as well
            if progress.cancelled:
                return 0
            try:
                written = file.write(data)
                progress.wrote(file.tell(), expected)
                return written
            except Exception as error:
                progress.cancel(error)
                return 0

    return Writer()


def _parse_error(parser: Any, messages: Messages, job: Job) -> BackendError:
    """What the parser says about the first node at fault."""
    where = f"{job.graph.component.name}: {job.graph.file.name}"
    if parser.num_errors == 0:
        return failure(messages, where, "reading the graph")
    problem = parser.get_error(0)
    text = " ".join(str(problem.desc()).split())
    advice = "export the bundle again"
    if "initializer" in text:
        advice = "a weight file beside it is missing or truncated: copy the bundle again"
    return BackendError(
        f"{where}: {problem.node_operator() or 'graph'} {problem.node_name()}: {text} "
        f"({problem.code().name}); {advice}"
    )


def _check_header(plan: Path, expected: bytes, component: str) -> None:
    with plan.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES or not header.startswith(expected):
        raise BackendError(
            f"{component}: the plan begins with {header[:8]!r} and not as an engine does; the "
            "version of TensorRT has not been tried"
        )


def _bytes_from(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise BackendError(f"{variable}: a number of bytes, got {text!r}")
    return int(text)


def _words(sizes: Profile) -> str:
    return ",".join(f"{axis}={allowed}" for axis, allowed in sizes.items())


def _list(axes: set[str]) -> str:
    return ", ".join(sorted(axes)) or "none"
