"""The backends by name, and why one of them cannot run here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from gentron.engines.base import Backend
from gentron.errors import BackendError, RequestError


@dataclass(frozen=True)
class BackendReport:
    """One line of `gentron-run doctor`."""

    name: str
    usable: bool
    detail: str  # versions and devices, or why not and what to do


def _onnxruntime() -> Backend:
    from gentron.engines.onnxruntime_cpu import OnnxRuntimeBackend

    return OnnxRuntimeBackend()


BACKENDS: dict[str, Callable[[], Backend]] = {"onnxruntime": _onnxruntime}
DEFAULT = "onnxruntime"


def backend_named(name: str | None) -> Backend:
    """Raises RequestError for an unknown name, BackendError for one that cannot run here."""
    chosen = DEFAULT if name is None else name
    if chosen not in BACKENDS:
        raise RequestError("backend", f"unknown backend {chosen!r}; one of {', '.join(BACKENDS)}")
    return BACKENDS[chosen]()


def backend_reports() -> list[BackendReport]:
    """Every backend, with what was found or what is missing."""
    reports = []
    for name, make in BACKENDS.items():
        try:
            make().close()
        except BackendError as error:
            reports.append(BackendReport(name, False, str(error)))
            continue
        reports.append(BackendReport(name, True, f"{_version(name)}, CPU"))
    return reports


def _version(package: str) -> str:
    for name in (package, f"{package}-gpu"):
        if importlib.util.find_spec(package):
            try:
                return f"{name} {importlib.metadata.version(name)}"
            except importlib.metadata.PackageNotFoundError:
                continue
    return package
