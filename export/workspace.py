"""The unfinished bundle: a hidden folder beside its target, kept when an export stops halfway."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from gentron.bundle import FileEntry, sha256_file
from gentron.errors import OutputError
from gentron.export.component import Exported

JOURNAL, SETTINGS, LOCK = "files.jsonl", "settings.json", "lock"


class Workspace:
    """`folder` becomes the bundle; `notes` say what of it is finished, and go with the last step.

    Raises OutputError for a target that is not empty, for an unfinished export that `resume` does
    not go on with, and for one that another process is writing.
    """

    def __init__(self, target: Path, settings: dict[str, Any], *, resume: bool):
        self.target = target
        self.folder = target.parent / f".{target.name}.partial"
        self.notes = self.folder / ".export"
        _check_target(target)
        if self.folder.exists() and not resume:
            raise OutputError(
                f"{self.folder}: an unfinished export; add --resume to go on with it, or remove it"
            )
        self.notes.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self._check_settings(settings)
            self._digests = self._read_journal()
        except BaseException:
            self._lock.close()
            raise

    def _locked(self) -> IO[str]:
        lock = (self.notes / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise OutputError(
                f"{self.folder}: another export is writing it; wait for it, or choose another -o"
            ) from error
        return lock

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self.notes / SETTINGS
        wanted = json.loads(json.dumps(settings))
        if not file.exists():
            file.write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")
            return
        before = json.loads(file.read_text("utf-8"))
        for name in sorted(set(before) | set(wanted)):
            if before.get(name) != wanted.get(name):
                raise OutputError(
                    f"{self.folder}: was started with {name} {before.get(name)!r}, now it is "
                    f"{wanted.get(name)!r}; repeat the first command, or remove the folder"
                )

    def _read_journal(self) -> dict[str, FileEntry]:
        file = self.notes / JOURNAL
        entries: dict[str, FileEntry] = {}
        for line in file.read_text("utf-8").splitlines() if file.exists() else ():
            try:
                name, sha256, size = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the process ended
            entries[name] = FileEntry(sha256, size)
        return entries

    def digest(self, file: Path) -> str | None:
        entry = self._digests.get(file.relative_to(self.folder).as_posix())
        if entry is None or not file.is_file() or file.stat().st_size != entry.size:
            return None
        return entry.sha256

    def finished(self, file: Path, sha256: str) -> None:
        name, size = file.relative_to(self.folder).as_posix(), file.stat().st_size
        self._digests[name] = FileEntry(sha256, size)
        with (self.notes / JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([name, sha256, size]) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def exported(self, component: str) -> Exported | None:
        """The component's record, if it was finished."""
        file = self._record(component)
        return Exported.from_json(file.read_text("utf-8")) if file.exists() else None

    def keep(self, exported: Exported) -> None:
        file = self._record(exported.component)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(exported.to_json(), "utf-8")
        unfinished.replace(file)

    def _record(self, component: str) -> Path:
        return self.notes / f"component.{component}.json"

    def files(self) -> dict[str, FileEntry]:
        """Every file of the bundle; digests that were taken while writing are not taken again."""
        found = {}
        for file in sorted(self.folder.rglob("*")):
            if file.is_file() and self.notes not in file.parents:
                name = file.relative_to(self.folder).as_posix()
                sha256 = self.digest(file) or sha256_file(file)
                found[name] = FileEntry(sha256, file.stat().st_size)
        return found

    def publish(self) -> None:
        """The finished bundle appears at its target in one step."""
        shutil.rmtree(self.notes)
        if self.target.is_dir():
            self.target.rmdir()  # empty, as checked; os.replace wants it gone on some systems
        os.replace(self.folder, self.target)
        self._lock.close()

    def abandon(self, *, keep: bool = True) -> bool:
        """After a failure: removes what is not worth keeping; true if something was kept."""
        worth = keep and (self._digests or any(self.notes.glob("component.*.json")))
        if not worth:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        return bool(worth)


def _check_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent}: no such folder; create it first")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target}: exists and is not empty; remove it, or choose another -o")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"{target.parent}: not writable; choose another -o")
