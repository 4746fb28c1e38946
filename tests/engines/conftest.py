"""A compiler that writes what it is told, to test what lies around compilers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gentron.contract import Component, TensorSpec
from gentron.engines.base import Graph
from gentron.engines.compiler import Compiler, Job
from gentron.engines.shapes import AxisRange


class Scribe(Compiler):
    """Writes two files; `before` runs in the middle."""

    backend = "scribe"
    precisions = ("fp16", "fp32")

    def __init__(self, before: Callable[[], None] = lambda: None, version: str = "1"):
        self.before, self.version, self.compiled = before, version, 0

    def identity(self, job):
        return {"version": self.version}

    def refusal(self, identity, targets):
        same = identity == {"version": self.version}
        return "" if same else f"made by version {identity['version']}"

    def check(self, job):
        pass

    def compile(self, job, folder, report):
        self.compiled += 1
        (folder / "first").write_bytes(b"half of it")
        report("writing", 0.5)
        self.before()
        (folder / "engine").write_bytes(job.graph.digest.encode() * 1000)
        return {"layers": 3}


@pytest.fixture
def scribe() -> type[Scribe]:
    return Scribe


@pytest.fixture
def job_of() -> Callable[..., Job]:
    def make(
        digest: str = "d1", *, samples: int = 1, flexible: bool = False, precision: str = "fp16"
    ) -> Job:
        component = Component("denoiser", "transformer", "denoiser",
                              (TensorSpec("state", "float32", ("B", 3)),), ())  # fmt: skip
        profiles = ({"B": AxisRange.fixed(samples)},)
        graph = Graph(
            component, Path("bundle/transformer/denoiser.onnx"), precision, 8, digest, None,
            profiles, flexible,
        )  # fmt: skip
        return Job(graph, precision, profiles)

    return make
