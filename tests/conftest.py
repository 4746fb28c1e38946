"""Bundles that tests share: tiny models exported once, and kept while no source has changed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gentron.runtime import Pipeline

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_configure(config: pytest.Config) -> None:
    """No example of Hypothesis fails because the machine was busy, and where CI is set, the same
    ones are tried each time: what is pushed is not refused for what it has not touched."""
    if config.pluginmanager.hasplugin("hypothesispytest"):  # not on a machine with engines alone
        from hypothesis import HealthCheck, settings

        settings.register_profile(
            "gentron", deadline=None, suppress_health_check=[HealthCheck.too_slow],
            derandomize="CI" in os.environ,
        )  # fmt: skip
        settings.load_profile("gentron")


def _sources_digest() -> str:
    import diffusers
    import onnxscript
    import torch
    import transformers

    digest = hashlib.sha256()
    for module in (torch, transformers, diffusers, onnxscript):
        digest.update(module.__version__.encode())
    for folder in ("gentron", "export"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "train" not in file.parts:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache folder for the run and its subprocesses, instead of the user's own; and one
    backend, whatever else is installed, for tests that name none."""
    folder = tmp_path_factory.mktemp("cache-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("GENTRON_BACKEND", "onnxruntime")
        yield folder


@pytest.fixture(scope="session")
def bundle_cache(request: pytest.FixtureRequest) -> Path:
    """A folder for exports that stays until a source of theirs changes; or, on a machine without
    the exporter, one that was made elsewhere and is named by GENTRON_TEST_BUNDLES."""
    if made := os.environ.get("GENTRON_TEST_BUNDLES"):
        return Path(made).resolve(strict=True)
    root = Path(request.config.cache.mkdir("bundles")) / _sources_digest()
    if not root.exists():
        for stale in root.parent.iterdir():
            shutil.rmtree(stale, ignore_errors=True)
        root.mkdir()
    return root


@pytest.fixture(scope="session")
def exported(bundle_cache: Path) -> Callable[..., Path]:
    """`exported("tiny")` is the fp16 bundle of a preset; do not write into it."""

    def get(preset: str, precision: str = "fp16") -> Path:
        folder = bundle_cache / f"{preset}-{precision}"
        if not (folder / "gentron.json").is_file():
            from gentron.export.bundle_writer import export_bundle

            # What a run left that was killed in the middle of this.
            shutil.rmtree(folder.with_name(f".{folder.name}.partial"), ignore_errors=True)
            export_bundle(model=preset, output=folder, **{precision: True})
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_bundle(exported: Callable[..., Path]) -> Path:
    """Two interleaved encoders, epsilon prediction, random weights. Read-only."""
    return exported("tiny")


@pytest.fixture(scope="session")
def tiny_video_bundle(exported: Callable[..., Path]) -> Path:
    """`tiny` with temporal attention. Read-only."""
    return exported("tiny-video")


@pytest.fixture
def tiny_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle) as pipeline:
        yield pipeline
