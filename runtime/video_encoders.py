"""Frames into files, one format each; `runtime/video_file.py` gives them their place.

MP4 holds H.264 as every browser plays it: constant rate, yuv420p, BT.709 tags, index in front. MKV
holds FFV1, which loses nothing. Every writer takes a frame at a time and keeps few of them.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt

from gentron.runtime.animations import (
    GIF_END,
    gif_frame,
    gif_head,
    webp_frame,
    webp_head,
    webp_length,
    webp_tail,
)
from gentron.runtime.image_file import encode_png

Frame = npt.NDArray[np.uint8]  # [H, W, 3]
FRAMES = "png"  # the format that is a folder of pictures
QUALITY = "14"  # x264's constant rate factor: no loss that one sees
LOOKAHEAD = "8"  # frames that x264 keeps to plan ahead; its own 50 would be all of a short video
BT709 = 1  # primaries, transfer and matrix have the same number in ITU-T H.273
LIMITED_RANGE = 1


class VideoWriter(ABC):
    """`with` it, `write` every frame; the file appears under its name when the block ends well,
    and nothing is left of it when it does not."""

    def __init__(self, temporary: Path, metadata: dict[str, Any], fps: float):
        self.temporary, self.fps = temporary, Fraction(fps).limit_denominator(1001)
        self.text = json.dumps({**metadata, "fps": fps}, ensure_ascii=False)
        self.target: Path | None = None  # where it went, once it is whole

    @abstractmethod
    def write(self, frame: Frame) -> None:
        """Adds one frame [H, W, 3]; all have the size of the first."""

    @abstractmethod
    def finish(self) -> None:
        """Completes the temporary file."""

    @abstractmethod
    def discard(self) -> None:
        """Closes what is open; the temporary file may be half written."""


class _Container(VideoWriter):
    """What FFmpeg writes."""

    container_format: str
    codec: str
    pixels: str
    codec_options: ClassVar[dict[str, str]] = {}
    container_options: ClassVar[dict[str, str]] = {}

    def __init__(self, temporary: Path, metadata: dict[str, Any], fps: float):
        super().__init__(temporary, metadata, fps)
        self._container: Any = None
        self._stream: Any = None
        self._title = str(metadata.get("prompt", ""))
        self._count = 0

    def write(self, frame: Frame) -> None:
        import av

        if self._container is None:
            self._open(frame.shape[1], frame.shape[0])
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = self._convert(picture)
        picture.pts, picture.time_base = self._count, 1 / self.fps
        self._count += 1
        with _as_os_error():
            self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        if self._container is None:
            raise OSError("no frame was written")
        with _as_os_error():
            self._container.mux(self._stream.encode(None))
            self._container.close()

    def discard(self) -> None:
        if self._container is not None:
            # What it still had to say failed before, or no longer matters.
            with contextlib.suppress(OSError), _as_os_error():
                self._container.close()

    def _open(self, width: int, height: int) -> None:
        import av

        self._container = av.open(
            str(self.temporary), "w", format=self.container_format, options=self.container_options
        )
        self._container.metadata.update({"comment": self.text, "title": self._title})
        self._stream = self._container.add_stream(
            self.codec, rate=self.fps, options=self.codec_options
        )
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = self.pixels
        self._tag(self._stream.codec_context)

    def _tag(self, context: Any) -> None:
        """Colour tags, where the pixels are not RGB."""

    def _convert(self, picture: Any) -> Any:
        return picture.reformat(format=self.pixels)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """FFmpeg's errors under the name that every other file error has."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


class _Mp4(_Container):
    container_format, codec, pixels = "mp4", "libx264", "yuv420p"
    codec_options: ClassVar = {"crf": QUALITY, "preset": "slow", "rc-lookahead": LOOKAHEAD}
    container_options: ClassVar = {"movflags": "+faststart"}

    def _tag(self, context: Any) -> None:
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED_RANGE

    def _convert(self, picture: Any) -> Any:
        return picture.reformat(
            format=self.pixels, dst_colorspace="ITU709", dst_color_range=LIMITED_RANGE
        )


class _Mkv(_Container):
    container_format, codec, pixels = "matroska", "ffv1", "bgr0"
    codec_options: ClassVar = {"level": "3"}


class _Animation(VideoWriter):
    """What `gentron.runtime.animations` puts together."""

    def __init__(self, temporary: Path, metadata: dict[str, Any], fps: float):
        super().__init__(temporary, metadata, fps)
        self._stream: BinaryIO | None = None

    def write(self, frame: Frame) -> None:
        if self._stream is None:
            self._stream = self.temporary.open("wb")
            self._stream.write(self._head(frame.shape[1], frame.shape[0]))
        self._stream.write(self._frame(frame))

    def finish(self) -> None:
        if self._stream is None:
            raise OSError("no frame was written")
        self._end(self._stream)
        self._stream.close()

    def discard(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take
                self._stream.close()

    @abstractmethod
    def _head(self, width: int, height: int) -> bytes: ...

    @abstractmethod
    def _frame(self, frame: Frame) -> bytes: ...

    @abstractmethod
    def _end(self, stream: BinaryIO) -> None: ...


class _Gif(_Animation):
    def _head(self, width: int, height: int) -> bytes:
        return gif_head(width, height, self.text.encode())

    def _frame(self, frame: Frame) -> bytes:
        return gif_frame(frame, float(1 / self.fps))

    def _end(self, stream: BinaryIO) -> None:
        stream.write(GIF_END)


class _WebP(_Animation):
    def _head(self, width: int, height: int) -> bytes:
        return webp_head(width, height)

    def _frame(self, frame: Frame) -> bytes:
        return webp_frame(frame, float(1 / self.fps))

    def _end(self, stream: BinaryIO) -> None:
        stream.write(webp_tail(self.text.encode()))
        place, length = webp_length(stream.tell())
        stream.seek(place)
        stream.write(length)


class _Pngs(VideoWriter):
    """A folder of numbered pictures, each with the settings."""

    def __init__(self, temporary: Path, metadata: dict[str, Any], fps: float):
        super().__init__(temporary, metadata, fps)
        self._count = 0

    def write(self, frame: Frame) -> None:
        self.temporary.mkdir(exist_ok=True)
        data = encode_png(frame, {**json.loads(self.text), "frame": self._count})
        (self.temporary / f"{self._count:04}.png").write_bytes(data)
        self._count += 1

    def finish(self) -> None:
        if not self._count:
            raise OSError("no frame was written")

    def discard(self) -> None:
        self._count = 0


WRITERS: dict[str, type[VideoWriter]] = {
    "mp4": _Mp4,
    "mkv": _Mkv,
    "gif": _Gif,
    "webp": _WebP,
    FRAMES: _Pngs,
}
