"""Engines that were compiled elsewhere: a folder with a manifest, trusted by the manifest's digest.

Compile in CI, deploy without a compiler. An engine is code, so nothing is loaded unless the
operator names the sha256 of `engines.json`, which in turn names that of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from gentron.digests import first_differing
from gentron.engines.cache import DAMAGED
from gentron.engines.compiler import Compiler, Facts, Job, Report
from gentron.engines.store import ENTRY, FORMAT, EngineKey, EngineStore, Entry, Prove
from gentron.errors import BackendError, OutputError, RequestError

MANIFEST = "engines.json"


class EngineFolder(EngineStore):
    """Read-only: whatever does not match is refused by name, nothing is built or repaired."""

    def __init__(self, folder: Path, sha256: str):
        """Reads the manifest and checks every file's size and digest; raises BackendError."""
        self.folder = folder
        text = _read(folder / MANIFEST)
        found = hashlib.sha256(text).hexdigest()
        if found != sha256.lower():
            raise BackendError(
                f"{folder / MANIFEST}: its sha256 is {found}, not {sha256}; use the engines and "
                "the digest that one gentron-build printed"
            )
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}, this version reads {FORMAT}")
            self._entries = [
                Entry.from_dict(entry, folder / _plain(name))
                for name, entry in values["engines"].items()
            ]
        except DAMAGED as error:
            raise BackendError(
                f"{folder / MANIFEST}: not a manifest of engines ({type(error).__name__}: {error});"
                " build them again with gentron-build -o"
            ) from error
        for entry in self._entries:
            _check(entry)

    def find(self, job: Job, compiler: Compiler) -> Entry | None:
        found, _ = self._search(job, compiler)
        return found

    def obtain(
        self,
        job: Job,
        compiler: Compiler,
        report: Report,  # noqa: ARG002  nothing is built
        prove: Prove | None = None,  # noqa: ARG002
    ) -> Entry:
        found, why = self._search(job, compiler)
        if found is None:
            raise BackendError(
                f"{self.folder}: no engine of {compiler.backend} for {job.graph.component.name} "
                f"in {job.precision} ({why}); build one where there is a compiler: gentron-build "
                f"BUNDLE --backend {compiler.backend} -o DIR"
            )
        return found

    def proved(self, entry: Entry, facts: Facts) -> None:
        """Is not kept: nothing here is written."""

    def reject(self, entry: Entry, why: str) -> None:
        raise BackendError(
            f"{entry.folder}: {why}; build it again for this machine with gentron-build -o"
        )

    def _search(self, job: Job, compiler: Compiler) -> tuple[Entry | None, str]:
        """By graph and precision; which shapes and devices, whoever built them has decided."""
        wanted = EngineKey.of(job, compiler)
        reasons = []
        for entry in self._entries:
            key = entry.key
            if (key.backend, key.component, key.precision) != (
                wanted.backend, wanted.component, wanted.precision
            ):  # fmt: skip
                continue
            if key.graph != wanted.graph:
                reasons.append("made from another bundle")
            elif not job.graph.flexible and key.profiles != wanted.profiles:
                reasons.append("compiled for other shapes")
            elif refusal := compiler.refusal(key.identity, key.targets):
                reasons.append(refusal)
            else:
                return entry, ""
        return None, "; ".join(dict.fromkeys(reasons)) or "it holds none"


def write_folder(folder: Path, entries: Iterable[Entry]) -> str:
    """Copies engines into a new or empty folder; returns the sha256 of its manifest.

    Raises OutputError if something is there already. The manifest comes last, so that a copy that
    was stopped is no folder of engines.
    """
    check_new(folder)
    made: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        engines = {}
        for entry in entries:
            made.append(folder / entry.key.name)
            shutil.copytree(entry.folder, made[-1])
            (folder / entry.key.name / ENTRY).unlink()
            engines[entry.key.name] = json.loads(entry.to_json())
        text = (json.dumps({"format": FORMAT, "engines": engines}, indent=1) + "\n").encode()
        partial = folder / f".{MANIFEST}"
        partial.write_bytes(text)
        os.replace(partial, folder / MANIFEST)
    except BaseException as error:
        for copy in made:
            shutil.rmtree(copy, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"{error.filename or folder}: {error.strerror or error}; name a folder on a disk with "
            "enough space"
        ) from error
    return hashlib.sha256(text).hexdigest()


def check_new(folder: Path) -> None:
    """Raises OutputError unless `folder` is empty or can be made; ask before a long build."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: is there already and not empty; name a new folder")
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        finally:
            for place in missing:  # until there is something to put into it
                place.rmdir()
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or error}); name another"
        ) from error


def check_sha256(text: str) -> str:
    """Raises RequestError unless `text` is a sha256 in hex."""
    if len(text) != 64 or set(text.lower()) - set("0123456789abcdef"):
        raise RequestError(
            "engines-sha256", f"must be the 64 hex digits that gentron-build printed, got {text!r}"
        )
    return text.lower()


def _check(entry: Entry) -> None:
    for name, file in entry.files.items():
        path = entry.folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BackendError(
                f"{path}: {error.strerror}; copy the folder of engines again"
            ) from error
        if size != file.size:
            raise BackendError(
                f"{path}: {size} bytes, the manifest says {file.size}: truncated or replaced; copy "
                "the folder of engines again"
            )
    if wrong := first_differing(entry.folder, {n: f.sha256 for n, f in entry.files.items()}):
        raise BackendError(
            f"{entry.folder / wrong}: its sha256 is not the manifest's: edited or damaged; copy "
            "the folder of engines again"
        )


def _plain(name: str) -> str:
    """A folder's name that stays inside."""
    if PurePosixPath(name).name != name or name in (".", "..") or "\\" in name or ":" in name:
        raise ValueError(f"the name {name!r} is not that of a folder")
    return name


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BackendError(
            f"{file}: {error.strerror}; give the folder that gentron-build -o wrote"
        ) from error
