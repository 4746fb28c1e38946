"""The files that jobs leave: whole or absent, whenever the process ends."""

from __future__ import annotations

import io
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

PART = ".part-"  # what no reader ever takes for a result


class JobFiles(ABC):
    """Numbered files by job. May be called from any thread, for one job from one at a time."""

    @abstractmethod
    def write(self, id: str, contents: Sequence[bytes]) -> None:
        """All of a job's files, in place of any that were there; raises OSError and leaves
        nothing."""

    @abstractmethod
    def open(self, id: str, index: int) -> BinaryIO | None:
        """Stays readable when the file is removed meanwhile."""

    @abstractmethod
    def remove(self, id: str) -> None:
        """Also of a job that has none."""

    def keep_only(self, ids: Collection[str]) -> int:  # noqa: ARG002  where there is nothing yet
        """Removes what belongs to no job of `ids`, and how many of them there were."""
        return 0


class MemoryFiles(JobFiles):
    def __init__(self) -> None:
        self._contents: dict[str, tuple[bytes, ...]] = {}

    def write(self, id: str, contents: Sequence[bytes]) -> None:
        self._contents[id] = tuple(contents)

    def open(self, id: str, index: int) -> BinaryIO | None:
        contents = self._contents.get(id, ())
        return io.BytesIO(contents[index]) if index < len(contents) else None

    def remove(self, id: str) -> None:
        self._contents.pop(id, None)


class FolderFiles(JobFiles):
    """A folder for each job. It is filled under another name, written through to the disk and
    renamed, so that all files of a job appear at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)

    def write(self, id: str, contents: Sequence[bytes]) -> None:
        part = self.folder / f"{PART}{id}"
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(mode=0o700)
            for index, content in enumerate(contents):
                with (part / str(index)).open("xb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            sync_folder(part)
            self.remove(id)  # of a run that was killed after this and before it was recorded
            part.rename(self.folder / id)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def open(self, id: str, index: int) -> BinaryIO | None:
        try:
            return (self.folder / id / str(index)).open("rb")
        except FileNotFoundError:
            return None

    def remove(self, id: str) -> None:
        """Under another name first, so that no reader meets a part of it."""
        part = self.folder / f"{PART}gone-{id}"
        try:
            (self.folder / id).rename(part)
        except FileNotFoundError:
            return
        shutil.rmtree(part)

    def keep_only(self, ids: Collection[str]) -> int:
        removed = 0
        for found in list(self.folder.iterdir()):
            if found.name in ids:
                continue
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)
            else:
                found.unlink()
            removed += 1
        return removed


def sync_folder(folder: Path) -> None:
    """So that a name in it is there after the power went."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
