"""Video files that carry what is needed to make them again, written as frames come."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gentron.errors import OutputError, RequestError
from gentron.runtime.image_file import (
    check_folder,
    check_target,
    is_folder,
    move_to_new,
    read_metadata,
)
from gentron.runtime.video_encoders import FRAMES, WRITERS, Frame

SUFFIXES = (".mp4", ".mkv", ".gif", ".webp")
FORMATS = (*(suffix[1:] for suffix in SUFFIXES), FRAMES)
MAX_FPS = 240


def check_fps(fps: float) -> float:
    """Raises RequestError unless it is a number of frames a second that files can hold."""
    if not 0 < fps <= MAX_FPS:  # NaN fails this too
        raise RequestError("fps", f"must be above 0 and at most {MAX_FPS}, got {fps}; try 8")
    return fps


def check_video_target(
    output: Path | None, count: int, size: tuple[int, int], format: str | None
) -> str:
    """Before anything is computed, as `check_target`; returns the format to write.

    `size` is (width, height). Raises OutputError for a suffix that contradicts the format, and for
    sides that H.264 does not take.
    """
    if format is not None and format not in FORMATS:
        raise RequestError("format", f"must be one of {', '.join(FORMATS)}, got {format!r}")
    is_file = output is not None and not is_folder(output)
    if is_file and format == FRAMES:
        assert output is not None
        check_folder(output.parent)
        if count > 1:
            raise OutputError(f"{output}: one folder for {count} videos; name an existing one")
        if output.exists():
            raise OutputError(f"{output}: is there already; name a new folder for the frames")
        return FRAMES
    check_target(output, count, what="videos", suffixes=SUFFIXES)
    chosen = format or (output.suffix.lower()[1:] if is_file and output else "mp4")
    if is_file and output is not None and output.suffix.lower() != f".{chosen}":
        raise OutputError(f"{output}: is not the name of a {chosen}; change one of them")
    if chosen == "mp4" and (size[0] % 2 or size[1] % 2):
        raise OutputError(
            f"H.264 needs even sides, got {size[0]}x{size[1]}; write .mkv, or change --size"
        )
    return chosen


class VideoFile:
    """A writer with a place: temporary name first, its own at the end."""

    def __init__(
        self,
        metadata: dict[str, Any],
        *,
        output: Path | None,
        name: str,
        fps: float,
        format: str,
    ):
        """`output` and `format` as `check_video_target` took and returned them; `name` without
        suffix is for folders, where a number is added rather than overwrite anything."""
        self._output, self._name, self._format = output, name, format
        folder = output if output is not None and output.is_dir() else None
        self._folder = folder or (output.parent if output is not None else Path())
        self._writer = WRITERS[format](
            self._folder / f".{secrets.token_hex(8)}.part", metadata, check_fps(fps)
        )

    def __enter__(self) -> VideoFile:
        return self

    def write(self, frame: Frame) -> None:
        """Raises OutputError if the disk is full or the folder gone."""
        try:
            self._writer.write(frame)
        except OSError as error:
            raise self._failure(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._writer.finish()
                self._writer.target = self._place()
        except OSError as problem:
            raise self._failure(problem) from problem
        finally:
            if self._writer.target is None:
                self._writer.discard()
                _remove(self._writer.temporary)

    @property
    def path(self) -> Path:
        """Where it is, after the block."""
        assert self._writer.target is not None, "not finished"
        return self._writer.target

    def _place(self) -> Path:
        temporary, output = self._writer.temporary, self._output
        suffix = "" if self._format == FRAMES else f".{self._format}"
        if temporary.is_file():
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        if output is not None and not output.is_dir():
            os.replace(temporary, output)
            return output
        for number in range(1, 100_000):
            tail = "" if number == 1 else f"-{number}"
            target = self._folder / f"{self._name}{tail}{suffix}"
            try:
                if suffix:
                    move_to_new(temporary, target)
                else:
                    os.mkdir(target)  # takes the name
                    os.replace(temporary, target)
                return target
            except FileExistsError:
                continue
        raise OutputError(f"{self._folder}: too many files named {self._name}; choose another -o")

    def _failure(self, error: OSError) -> OutputError:
        where = self._output or self._folder
        return OutputError(
            f"{where}: cannot be written: {error.strerror or error}; free some space or choose "
            "another place with -o"
        )


def read_video_metadata(file: Path) -> dict[str, Any]:
    """What a `VideoFile` stored, or a picture of one; raises RequestError for any other file."""
    if file.is_dir():
        return read_metadata(file / "0000.png")
    if file.suffix.lower() == ".png":
        return read_metadata(file)
    try:
        text = _animation_text(file) if file.suffix.lower() in (".gif", ".webp") else _tag(file)
        metadata = json.loads(text) if text else None
    except FileNotFoundError as error:
        raise RequestError("like", f"{file}: no such file") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError("like", f"{file}: not a readable video: {error}") from error
    if not isinstance(metadata, dict):
        raise RequestError(
            "like",
            f"{file}: carries no settings; only videos that gentron-run wrote can be repeated "
            "(images: gentron-run image --like)",
        )
    return metadata


def read_frames(file: Path) -> Frame:
    """Frames [F, H, W, 3] of an .mp4 or .mkv; raises RequestError for any other file."""
    import av

    try:
        with av.open(str(file)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            return np.stack(frames)
    except (OSError, ValueError, IndexError) as error:
        raise RequestError("video", f"{file}: not a readable video: {error}") from error


def _tag(file: Path) -> str | None:
    import av

    with av.open(str(file)) as container:
        tags = {name.lower(): value for name, value in container.metadata.items()}
    return tags.get("comment")


def _animation_text(file: Path) -> str | None:
    from PIL import Image

    with Image.open(file) as picture:
        found = picture.info.get("comment") or picture.info.get("xmp")
    return found.decode() if isinstance(found, bytes) else found


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
