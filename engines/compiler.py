"""What turns a graph into the files of an engine, ahead of time.

A compiler writes into a folder that is its own until it returns; the store around it (a cache, or
a folder to deploy) makes the result durable and finds it again by its inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentron.engines.base import Graph
from gentron.engines.shapes import Profile
from gentron.errors import RequestError

Facts = dict[str, Any]  # JSON values
Report = Callable[[str, float], None]  # (what is being done, share done from 0 to 1)


@dataclass(frozen=True)
class Job:
    """One graph to compile, for which shapes and which devices."""

    graph: Graph
    precision: str  # fp32, fp16, bf16: what the engine is to compute in
    profiles: tuple[Profile, ...]  # of this engine; a backend may split those of its graph
    targets: tuple[str, ...] = ()  # GPU generations such as sm89; empty: the compiler's default


class Compiler(ABC):
    """One per backend. Needs no device to compile for, unless it says so."""

    backend: str
    precisions: tuple[str, ...]  # that its engines can compute in, the default first
    on_request: tuple[str, ...] = ()  # others, which nothing but a user's word chooses

    def graph_precision(self, precision: str) -> str:
        """Which of a bundle's graphs becomes an engine of `precision`; raises RequestError."""
        if precision not in (*self.precisions, *self.on_request):
            raise RequestError(
                "precision",
                f"{self.backend} compiles {' or '.join(self.precisions)}, not {precision}",
            )
        return precision

    def jobs(self, graph: Graph, precision: str, targets: Sequence[str] = ()) -> list[Job]:
        """The engines that one graph becomes: one for all its profiles, unless overridden."""
        return [Job(graph, precision, graph.profiles, tuple(targets))]

    def prover(self, job: Job) -> Callable[[Path], Facts] | None:  # noqa: ARG002
        """Runs a fresh engine's files against the golden probes; None where it cannot run."""
        return None

    @abstractmethod
    def identity(self, job: Job) -> Mapping[str, Any]:
        """Whatever decides the result besides the job itself: version, target device, options.

        JSON values; part of the engine's key. Must not compile or load anything large.
        """

    @abstractmethod
    def refusal(self, identity: Mapping[str, Any], targets: Sequence[str]) -> str:
        """Why an engine with that stored identity cannot run on this machine; empty if it can."""

    @abstractmethod
    def check(self, job: Job) -> None:
        """Refuses what cannot work before anything is started, with numbers: RequestError for
        profiles or targets, ResourceError for memory."""

    @abstractmethod
    def compile(self, job: Job, folder: Path, report: Report) -> Facts:
        """Writes the engine's files into the empty `folder`; returns what to keep beside them.

        Raises BackendError with component, layer and the compiler's own last errors. Ctrl-C stops
        it within a step; whatever it leaves in `folder` is then removed by the store.
        """
