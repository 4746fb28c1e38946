"""Facts about a bundle and about this machine, as plain values for people and programs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import gentron
from gentron.bundle import Bundle, packaged_names
from gentron.engines import backend_reports
from gentron.runtime.result import machine
from gentron.solvers import solvers_for

PACKAGES = (
    "numpy",
    "pillow",
    "av",
    "tokenizers",
    "safetensors",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu12-libs",
    "torch",
)


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Contents, sizes, precisions, weights and licences of an opened bundle."""
    manifest, config = bundle.manifest, bundle.config
    sizes: dict[str, int] = {}
    for name, entry in manifest.files.items():
        folder = name.split("/")[0] if "/" in name else "."
        sizes[folder] = sizes.get(folder, 0) + entry.size
    width, height = bundle.native_size
    return {
        "name": manifest.name,
        "path": str(bundle.path),
        "digest": bundle.digest,
        "weights": manifest.weights
        + (" (it draws noise: for tests of speed and wiring)" * (manifest.weights == "random")),
        "storage": manifest.storage,
        "exported by": f"gentron {manifest.version}",
        "transformer": f"{config.depth} blocks, {config.width} wide, {config.heads} heads"
        + (", temporal attention" * config.temporal),
        "text": ", ".join(f"{t.family} ({t.width} wide, {t.max_tokens} tokens)"
                          for t in config.text),
        "native size": f"{width}x{height}",
        "prediction": bundle.schedule.prediction,
        "solvers": ", ".join(solvers_for(bundle.schedule)),
        "defaults": dict(vars(manifest.defaults)),
        "components": {
            name: ", ".join(manifest.precisions.get(name, ())) or "not in it: exported with --only"
            for name in bundle.components
        },
        "sizes": {name: f"{size / 1e6:.1f} MB" for name, size in sorted(sizes.items())}
        | {"total": f"{sum(sizes.values()) / 1e6:.1f} MB"},
        "provenance": dict(manifest.provenance),
        "licences": {entry["what"]: entry["licence"] for entry in manifest.licences},
    }  # fmt: skip


def _nvidia_devices() -> str:
    """Names from the driver's own files, so that asking needs no library."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text("utf-8").splitlines():
            if line.startswith("Model:"):
                names.append(line.partition(":")[2].strip())
    return ", ".join(names) or "none found"


def machine_facts() -> dict[str, Any]:
    """Versions, devices and backends; never fails because something is absent."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "gentron": gentron.__version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "devices": {"cpu": f"{machine()}, {os.cpu_count()} cores", "nvidia": _nvidia_devices()},
        "bundles": ", ".join(packaged_names()) or "none",
        "backends": {
            report.name: ("usable: " if report.usable else "not usable: ") + report.detail
            for report in backend_reports()
        },
        "packages": packages,
    }
