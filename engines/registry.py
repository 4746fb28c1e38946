"""The backends by name, which of them can run here, and which one runs if nobody says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from gentron.engines.base import Backend
from gentron.engines.compiler import Compiler
from gentron.engines.options import EngineOptions
from gentron.errors import BackendError, RequestError


def _tensorrt_compiler(options: EngineOptions) -> Compiler:
    from gentron.engines.trt_build import TensorRtCompiler

    return TensorRtCompiler("tensorrt", strip=options.strip)


def _rtx_compiler(options: EngineOptions) -> Compiler:
    from gentron.engines.trt_build import TensorRtCompiler

    return TensorRtCompiler("tensorrt-rtx", strip=options.strip)


def _openvino_compiler(options: EngineOptions) -> Compiler:
    from gentron.engines.openvino_compiler import OpenVinoCompiler

    return OpenVinoCompiler(options)


def _onnxruntime_compiler(options: EngineOptions) -> Compiler:
    from gentron.engines.onnxruntime_compiler import OnnxRuntimeCompiler

    return OnnxRuntimeCompiler(options)


COMPILERS: dict[str, Callable[[EngineOptions], Compiler]] = {
    "tensorrt": _tensorrt_compiler,
    "tensorrt-rtx": _rtx_compiler,
    "openvino": _openvino_compiler,
    "onnxruntime": _onnxruntime_compiler,
}


@dataclass(frozen=True)
class BackendReport:
    """One line of `gentron-run doctor`."""

    name: str
    usable: bool
    detail: str  # versions and devices, or why not and what to do


def _tensorrt(options: EngineOptions) -> Backend:
    from gentron.engines.trt_run import TensorRtBackend

    return TensorRtBackend("tensorrt", options)


def _rtx(options: EngineOptions) -> Backend:
    from gentron.engines.trt_run import TensorRtBackend

    return TensorRtBackend("tensorrt-rtx", options)


def _provider(name: str) -> Callable[[EngineOptions], Backend]:
    def make(options: EngineOptions) -> Backend:
        from gentron.engines.onnxruntime_gpu import ProviderBackend

        return ProviderBackend(name, options)

    return make


def _openvino(options: EngineOptions) -> Backend:
    from gentron.engines.openvino_cpu import OpenVinoBackend

    return OpenVinoBackend(options)


def _onnxruntime(options: EngineOptions) -> Backend:
    from gentron.engines.onnxruntime_cpu import OnnxRuntimeBackend

    return OnnxRuntimeBackend(options)


VARIABLE = "GENTRON_BACKEND"
# In the order in which they are preferred; the last two compile for minutes, and are to be named.
BACKENDS: dict[str, Callable[[EngineOptions], Backend]] = {
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _rtx,
    "onnxruntime-cuda": _provider("onnxruntime-cuda"),
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "onnxruntime-tensorrt": _provider("onnxruntime-tensorrt"),
    "onnxruntime-rtx": _provider("onnxruntime-rtx"),
}
ON_CPU = frozenset({"openvino", "onnxruntime"})


def backend_named(name: str | None, options: EngineOptions | None = None) -> Backend:
    """The backend of that name, or of the variable GENTRON_BACKEND, or the first usable here.

    Raises RequestError for an unknown name and for a CPU's where a GPU was chosen by number,
    BackendError for one that cannot run here.
    """
    options = options or EngineOptions()
    name = os.environ.get(VARIABLE) or None if name is None else name
    if name is not None:
        if name not in BACKENDS:
            raise RequestError("backend", f"unknown backend {name!r}; one of {', '.join(BACKENDS)}")
        if options.device is not None and name in ON_CPU:
            raise RequestError(
                "devices", f"are GPUs, and {name} computes on the CPU; name another --backend"
            )
        return BACKENDS[name](options)
    reasons = []
    for name, make in BACKENDS.items():
        if options.device is not None and name in ON_CPU:
            continue
        try:
            return make(options)
        except BackendError as error:
            reasons.append(str(error))
    raise BackendError(f"no backend can run here: {'; '.join(reasons)}")


def compiler_named(name: str, options: EngineOptions | None = None) -> Compiler:
    """What compiles for that backend; raises RequestError for an unknown name, BackendError where
    its packages are missing."""
    if name not in COMPILERS:
        raise RequestError("backend", f"unknown backend {name!r}; one of {', '.join(COMPILERS)}")
    return COMPILERS[name](options or EngineOptions())


def backend_reports() -> list[BackendReport]:
    """Every backend, with what was found or what is missing."""
    reports = []
    for name, make in BACKENDS.items():
        try:
            with make(EngineOptions()) as backend:
                reports.append(BackendReport(name, True, backend.describe()))
        except BackendError as error:
            reports.append(BackendReport(name, False, str(error)))
    return reports
