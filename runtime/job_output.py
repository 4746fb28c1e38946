"""The files of a result, as bytes."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.errors import StorageError
from gentron.runtime.image_file import encode_png
from gentron.runtime.jobs import VIDEO, Job
from gentron.runtime.result import Result
from gentron.runtime.video_file import VideoFile

Picture = npt.NDArray[np.uint8]


def output_files(result: Result, job: Job) -> list[bytes]:
    """An MP4, or a file for each picture. Raises OutputError, StorageError."""
    if job.kind == VIDEO:
        return [video_bytes(result, job.output["fps"])]
    return [
        picture_bytes(picture, job.output, result.metadata(row))
        for row, picture in enumerate(result.images)
    ]


def video_bytes(result: Result, fps: float) -> bytes:
    """An MP4 of the first sample, with its settings. Raises OutputError, StorageError."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="gentron-")
    except OSError as error:
        raise StorageError(
            f"no folder for temporary files: {error.strerror}: {tempfile.gettempdir()}; free some "
            "space there, or start the server with another TMPDIR"
        ) from error
    with folder:
        file = Path(folder.name) / "video.mp4"
        metadata = {**result.metadata(0), "fps": fps}
        with VideoFile(metadata, output=file, name="video", fps=fps, format="mp4") as video:
            for frame in result.videos[0]:
                video.write(frame)
        return file.read_bytes()


def picture_bytes(
    picture: Picture, output: Mapping[str, Any], metadata: Mapping[str, Any]
) -> bytes:
    """A file in `output`'s format, JPEG and WebP with its `compression`; PNG carries the
    metadata."""
    if output["format"] == "png":
        return encode_png(picture, dict(metadata))
    from PIL import Image

    file = io.BytesIO()
    quality = 100 if output["compression"] is None else output["compression"]
    Image.fromarray(picture).save(file, format=output["format"], quality=quality)
    return file.getvalue()
