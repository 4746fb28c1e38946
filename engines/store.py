"""Compiled engines on disk, found by what they were made from.

Keys are made of inputs alone, because compilers are not reproducible to the byte. Whatever is
loaded has the sha256 that was recorded when it was written: an engine is code.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gentron.engines.compiler import Compiler, Facts, Job, Report
from gentron.engines.shapes import AxisRange, Profile
from gentron.errors import BackendError

FORMAT = 1  # of entry.json and engines.json
ENTRY = "entry.json"

Prove = Callable[[Path], Facts]  # runs an engine's files against its probes, where it can run


class UnusableStoreError(BackendError):
    """Nothing can be kept here: no such disk, or a folder that others can write to."""


class StaleEngineError(BackendError):
    """An engine's files are as written, and yet it cannot be loaded: rebuild it."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that decides what an engine is."""

    backend: str
    component: str
    precision: str
    graph: str  # sha256 of graph and weights
    profiles: tuple[Profile, ...]
    targets: tuple[str, ...]
    identity: Mapping[str, Any]  # of the compiler: version, device, options

    @classmethod
    def of(cls, job: Job, compiler: Compiler) -> EngineKey:
        return cls(
            backend=compiler.backend,
            component=job.graph.component.name,
            precision=job.precision,
            graph=job.graph.digest,
            profiles=job.profiles,
            targets=job.targets,
            identity=dict(compiler.identity(job)),
        )

    def to_dict(self) -> dict[str, Any]:
        profiles = [{a: str(r) for a, r in sorted(p.items())} for p in self.profiles]
        changed = {"profiles": profiles, "targets": list(self.targets)}
        return vars(self) | changed | {"identity": dict(self.identity)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineKey:
        """Raises KeyError, TypeError, ValueError for values of another kind."""
        profiles = tuple(
            {str(axis): _range(text) for axis, text in profile.items()}
            for profile in values["profiles"]
        )
        texts = ("backend", "component", "precision", "graph")
        if any(not isinstance(values[name], str) for name in texts):
            raise TypeError("a name is not text")
        return cls(
            **{name: values[name] for name in texts},
            profiles=profiles,
            targets=tuple(map(str, values["targets"])),
            identity=dict(values["identity"]),
        )

    @property
    def digest(self) -> str:
        text = json.dumps({"format": FORMAT, **self.to_dict()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """Of the entry's folder; short enough for every filesystem."""
        return f"{self.backend}-{self.component}-{self.precision}-{self.digest[:24]}"

    def same_but_profiles(self, other: EngineKey) -> bool:
        return vars(self) | {"profiles": ()} == vars(other) | {"profiles": ()}


def _range(text: str) -> AxisRange:
    numbers = [int(number) for number in text.split(":")]
    return AxisRange.fixed(numbers[0]) if len(numbers) == 1 else AxisRange(*numbers)


@dataclass(frozen=True)
class StoredFile:
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Entry:
    """One compiled engine."""

    folder: Path
    key: EngineKey
    files: Mapping[str, StoredFile]
    facts: Facts  # what the compiler and the probes found
    seconds: float  # that it took to build
    created: float  # seconds since 1970
    fresh: bool = field(default=False, compare=False)  # built just now, not found

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())

    def file(self, name: str) -> Path:
        if name not in self.files:
            raise StaleEngineError(f"{self.folder}: has no file {name}")
        return self.folder / name

    def to_json(self) -> str:
        values = {
            "format": FORMAT,
            "key": self.key.to_dict(),
            "files": {name: vars(file) for name, file in sorted(self.files.items())},
            "facts": self.facts,
            "seconds": self.seconds,
            "created": self.created,
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path) -> Entry:
        """Raises KeyError, TypeError, ValueError for values of another kind."""
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, this version reads {FORMAT}")
        files = {
            str(name): StoredFile(str(file["sha256"]), int(file["size"]))
            for name, file in values["files"].items()
        }
        if not files or any(Path(name).name != name for name in files):
            raise ValueError("file names that are not plain")
        return cls(
            folder=folder,
            key=EngineKey.from_dict(values["key"]),
            files=files,
            facts=dict(values["facts"]),
            seconds=float(values["seconds"]),
            created=float(values["created"]),
        )


class EngineStore(ABC):
    """Where compiled engines come from."""

    @abstractmethod
    def find(self, job: Job, compiler: Compiler) -> Entry | None:
        """A whole and unaltered engine for the job, or None."""

    @abstractmethod
    def obtain(
        self, job: Job, compiler: Compiler, report: Report, prove: Prove | None = None
    ) -> Entry:
        """As `find`, and builds it where it is missing and building is allowed.

        A fresh engine is kept only after `prove` returned. Raises BackendError, ResourceError.
        """

    @abstractmethod
    def proved(self, entry: Entry, facts: Facts) -> None:
        """What was found when an engine ran for the first time, long after it was built perhaps.
        A store that keeps it saves later starts the proof."""

    @abstractmethod
    def reject(self, entry: Entry, why: str) -> None:
        """Takes an engine that cannot be loaded out of the way; raises BackendError if this store
        cannot be healed."""
