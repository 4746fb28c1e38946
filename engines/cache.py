"""The engine cache: one folder per engine, complete or absent, for any number of processes.

An engine is built in a hidden folder under an advisory lock, written through to the disk, and
renamed into place with its `entry.json`. So a reader never meets half of one, two processes never
build the same one, and whatever a killed build left is removed by the next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gentron.digests import cache_folder, check_own, first_differing, read_digest, remember
from gentron.engines.compiler import Compiler, Facts, Job, Report
from gentron.engines.store import (
    ENTRY,
    EngineKey,
    EngineStore,
    Entry,
    Prove,
    StoredFile,
    UnusableStoreError,
)
from gentron.errors import BackendError, BundleError, ResourceError

log = logging.getLogger(__name__)

BUDGET = 50_000_000_000  # bytes; the two largest models in two forms
BUDGET_VARIABLE = "GENTRON_CACHE_BYTES"
BUILDING, ASIDE = ".building-", ".aside-"  # what readers never take for an engine
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Removed:
    name: str
    size: int  # bytes
    why: str


class EngineCache(EngineStore):
    """Engines in the user's cache folder, or in another that only they can write."""

    def __init__(
        self, folder: Path | None = None, *, build: bool = True, budget: int | None = None
    ):
        """`build=False` refuses to compile what is missing. `budget` in bytes; the engines used
        longest ago go first."""
        self.folder = folder or cache_folder() / "engines"
        self.build = build
        self.budget = _budget() if budget is None else budget

    def find(self, job: Job, compiler: Compiler) -> Entry | None:
        key = EngineKey.of(job, compiler)
        if entry := self._usable(self.folder / key.name, key):
            return entry
        if not job.graph.flexible:
            return None
        others = [e for e in self.entries(key.backend) if key.same_but_profiles(e.key)]
        for entry in sorted(others, key=lambda e: e.created, reverse=True):
            if self._usable(entry.folder, entry.key):
                return entry
        return None

    def obtain(
        self, job: Job, compiler: Compiler, report: Report, prove: Prove | None = None
    ) -> Entry:
        self._make_folder()
        if entry := self.find(job, compiler):
            return entry
        key = EngineKey.of(job, compiler)
        if not self.build:
            # The decoder has a precision of its own, which is only heard with its name.
            alone = " --component vae_decoder" if key.component == "vae_decoder" else ""
            raise BackendError(
                f"{key.backend}: no engine for {key.component} in {key.precision}, and building "
                f"is off; run: gentron-build {job.graph.file.parent.parent} "
                f"--backend {key.backend}{alone} --precision {key.precision}"
                ", and with the same --profile if you gave one"
            )
        compiler.check(job)
        with self._lock(key.name, report):
            if entry := self.find(job, compiler):  # another process was faster
                return entry
            return self._build(key, job, compiler, report, prove)

    def proved(self, entry: Entry, facts: Facts) -> None:
        """Nothing is lost where that cannot be written: it is found again at the next start."""
        with contextlib.suppress(OSError):
            partial = entry.folder / f".{ENTRY}-{os.getpid()}"
            partial.write_text(replace(entry, facts={**entry.facts, **facts}).to_json(), "utf-8")
            _sync(partial)
            os.replace(partial, entry.folder / ENTRY)

    def reject(self, entry: Entry, why: str) -> None:
        self._set_aside(entry.folder, why)

    def entries(self, backend: str | None = None) -> list[Entry]:
        """Every entry that can be read, by name; damaged ones are left out and left alone."""
        found = []
        for folder in sorted(self.folder.glob("*/")) if self.folder.is_dir() else ():
            if folder.name.startswith("."):
                continue
            with contextlib.suppress(OSError, *DAMAGED):
                entry = _read_entry(folder)
                if backend in (None, entry.key.backend) and entry.key.name == folder.name:
                    found.append(entry)
        return found

    def verify(self) -> Iterator[tuple[str, str]]:
        """Reads every file of every entry anew: its name, and what is wrong with it or nothing."""
        for folder in sorted(self.folder.glob("*/")) if self.folder.is_dir() else ():
            if folder.name.startswith("."):
                continue
            yield folder.name, _problem(folder, anew=True)

    def prune(self, *, budget: int | None = None) -> list[Removed]:
        """Removes what was set aside or left behind, then the engines used longest ago, until the
        rest fits the budget."""
        removed = list(self._remove_leftovers())
        entries = sorted(self.entries(), key=_last_used)
        total = sum(entry.size for entry in entries)
        allowed = self.budget if budget is None else budget
        for entry in entries:
            if total <= allowed:
                break
            with self._try_lock(entry.key.name) as free:
                if not free:
                    continue
                shutil.rmtree(entry.folder, ignore_errors=True)
            total -= entry.size
            removed.append(Removed(entry.folder.name, entry.size, "used longest ago"))
        return removed

    def _build(
        self, key: EngineKey, job: Job, compiler: Compiler, report: Report, prove: Prove | None
    ) -> Entry:
        building = self.folder / f"{BUILDING}{key.name}"
        shutil.rmtree(building, ignore_errors=True)  # a killed build's; we hold the lock
        started = time.monotonic()
        try:
            building.mkdir(mode=0o700)
            facts = compiler.compile(job, building, report)
            if prove is not None:
                report("checking against the golden probes", 1.0)
                facts = {**facts, **prove(building)}
            files = {}
            for file in sorted(building.iterdir()):
                _sync(file)
                files[file.name] = StoredFile(read_digest(file).sha256, file.stat().st_size)
            seconds, now = round(time.monotonic() - started, 3), round(time.time(), 3)
            entry = Entry(building, key, files, facts, seconds, now)
            (building / ENTRY).write_text(entry.to_json(), "utf-8")
            _sync(building / ENTRY)
            _sync(building)
            os.rename(building, self.folder / key.name)
            _sync(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"{self.folder}: the disk is full while building {key.component}; free some "
                    "space, or run: gentron-build --prune"
                ) from error
            raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        folder = self.folder / key.name
        remember({folder / name: file.sha256 for name, file in files.items()})
        self._keep_budget(key.name)
        return replace(entry, folder=folder, fresh=True)

    def _keep_budget(self, newest: str) -> None:
        entries = sorted(self.entries(), key=_last_used)
        over = sum(entry.size for entry in entries) - self.budget
        for entry in entries:
            if over <= 0:
                return
            if entry.key.name == newest:
                continue
            with self._try_lock(entry.key.name) as free:
                if free:
                    log.warning(
                        f"{entry.folder}: removed, because the engine cache is over its budget of "
                        f"{self.budget / 1e9:.1f} GB ({BUDGET_VARIABLE} sets another)"
                    )
                    shutil.rmtree(entry.folder, ignore_errors=True)
                    over -= entry.size

    def _usable(self, folder: Path, key: EngineKey) -> Entry | None:
        """The entry, whole and unaltered; a damaged one is set aside with one warning."""
        if not folder.is_dir():
            return None
        if problem := _problem(folder, key=key):
            self._set_aside(folder, problem)
            return None
        entry = _read_entry(folder)
        with contextlib.suppress(OSError):
            os.utime(folder / ENTRY)  # when it was last used
        return entry

    def _set_aside(self, folder: Path, why: str) -> None:
        target = folder.with_name(f"{ASIDE}{folder.name}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            shutil.rmtree(target, ignore_errors=True)
            os.rename(folder, target)
            log.warning(f"{folder}: {why}; set aside, and built again when it is needed")

    def _remove_leftovers(self) -> Iterator[Removed]:
        for folder in sorted(self.folder.glob(".*/")) if self.folder.is_dir() else ():
            if folder.name.startswith(ASIDE):
                yield _remove(folder, "set aside")
            elif folder.name.startswith(BUILDING):
                with self._try_lock(folder.name.removeprefix(BUILDING)) as free:
                    if free:
                        yield _remove(folder, "left by a build that was killed")

    def _make_folder(self) -> None:
        """Raises BackendError where another user could put an engine of theirs."""
        try:
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            check_own(self.folder)
        except OSError as error:
            raise UnusableStoreError(
                f"engine cache: {error.strerror or error}: {self.folder}; engines are code, so "
                "only you may write there; set XDG_CACHE_HOME to a folder of your own"
            ) from error

    @contextlib.contextmanager
    def _lock(self, name: str, report: Report) -> Iterator[None]:
        """Waits while another process builds the same engine; a killed one holds no lock."""
        with self._lock_file(name) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report("another process is building it; waiting", 0.0)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _try_lock(self, name: str) -> Iterator[bool]:
        with self._lock_file(name) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @contextlib.contextmanager
    def _lock_file(self, name: str) -> Iterator[int]:
        """Lock files stay: removing one would let two processes lock two files of one name."""
        short = hashlib.sha256(name.encode()).hexdigest()[:2]  # at most 256 of them
        handle = os.open(self.folder / f".lock-{short}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield handle
        finally:
            os.close(handle)


def _read_entry(folder: Path) -> Entry:
    return Entry.from_dict(json.loads((folder / ENTRY).read_text("utf-8")), folder)


def _problem(folder: Path, *, key: EngineKey | None = None, anew: bool = False) -> str:
    """What is wrong with an entry, or nothing."""
    try:
        check_own(folder)
        entry = _read_entry(folder)
        if entry.key.name != folder.name or (key is not None and entry.key.digest != key.digest):
            return f"{ENTRY} is of another engine"
        for name, file in entry.files.items():
            if (folder / name).stat().st_size != file.size:
                return f"{name} is truncated or replaced"
        wrong = first_differing(folder, {n: f.sha256 for n, f in entry.files.items()}, anew=anew)
    except (OSError, BundleError) as error:
        return f"cannot be read ({error})"
    except DAMAGED as error:
        return f"{ENTRY} is damaged ({type(error).__name__}: {error})"
    return f"{wrong} was edited or damaged" if wrong else ""


def _last_used(entry: Entry) -> float:
    try:
        return (entry.folder / ENTRY).stat().st_mtime
    except OSError:
        return 0.0


def _remove(folder: Path, why: str) -> Removed:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    return Removed(folder.name, size, why)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _budget() -> int:
    text = os.environ.get(BUDGET_VARIABLE, "")
    if not text:
        return BUDGET
    if not text.isdecimal():
        raise BackendError(f"{BUDGET_VARIABLE}: a number of bytes, got {text!r}")
    return int(text)
