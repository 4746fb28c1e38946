"""GIF and animated WebP, a frame at a time: what their encoders keep in memory goes to the file.

Pillow compresses single pictures; the containers around them are written here, after the GIF89a
specification and Google's WebP Container Specification.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]  # [H, W, 3]
GIF_END = b";"
GIF_COLORS = 256
GIF_LEAVE = 1 << 2  # disposal 1: the next frame is drawn over this one
WEBP_ANIMATION, WEBP_XMP = 0x02, 0x04  # flags of the VP8X chunk
WEBP_DO_NOT_BLEND = 0x02


def gif_head(width: int, height: int, comment: bytes) -> bytes:
    """Everything before the first frame: it plays for ever, and carries a comment."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    loop = b"!\xff\x0bNETSCAPE2.0" + _blocks(struct.pack("<BH", 1, 0))
    return screen + loop + b"!\xfe" + _blocks(comment)


def gif_frame(frame: Frame, seconds: float) -> bytes:
    """A frame with a palette of its own; GIF counts in hundredths of a second."""
    from PIL import Image

    stream = io.BytesIO()
    height, width, _ = frame.shape
    Image.fromarray(frame).quantize(GIF_COLORS).save(stream, "GIF", interlace=False)
    data = stream.getvalue()
    bits = data[10] & 7  # of the palette's length, less one; a GIF of Pillow's has one for all
    palette, place = data[13 : 13 + 3 * (2 << bits)], 13 + 3 * (2 << bits)
    while data[place : place + 1] == b"!":  # extensions: a label, then blocks
        place += 2
        while data[place]:
            place += 1 + data[place]
        place += 1
    assert data[place : place + 1] == b",", "Pillow wrote no image"
    control = b"!\xf9" + _blocks(struct.pack("<BHB", GIF_LEAVE, round(100 * seconds), 0))
    where = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0x80 | bits)
    return control + where + palette + data[place + 10 : -1]


def webp_head(width: int, height: int) -> bytes:
    """Everything before the first frame; its length field is `webp_length` at the end."""
    canvas = struct.pack("<I", WEBP_ANIMATION | WEBP_XMP) + _three(width - 1) + _three(height - 1)
    loop = struct.pack("<IH", 0, 0)  # background colour; for ever
    return b"RIFF\0\0\0\0WEBP" + _chunk(b"VP8X", canvas) + _chunk(b"ANIM", loop)


def webp_frame(frame: Frame, seconds: float) -> bytes:
    """A frame without loss."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "WEBP", lossless=True)
    picture = stream.getvalue()[12:]  # after RIFF, length, WEBP: the bitstream's own chunk
    assert picture[:4] == b"VP8L", picture[:4]
    height, width, _ = frame.shape
    place = _three(0) + _three(0) + _three(width - 1) + _three(height - 1)
    return _chunk(b"ANMF", place + _three(round(1000 * seconds)) + bytes([WEBP_DO_NOT_BLEND])
                  + picture)  # fmt: skip


def webp_tail(xmp: bytes) -> bytes:
    """Metadata, after the last frame."""
    return _chunk(b"XMP ", xmp)


def webp_length(size: int) -> tuple[int, bytes]:
    """Where the length of a file of `size` bytes stands in it, and as what."""
    return 4, struct.pack("<I", size - 8)


def _blocks(data: bytes) -> bytes:
    """GIF's sub-blocks: at most 255 bytes each, an empty one at the end."""
    parts = [data[k : k + 255] for k in range(0, len(data), 255)]
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


def _chunk(name: bytes, data: bytes) -> bytes:
    """RIFF's: name, length, data, padded to an even length."""
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _three(value: int) -> bytes:
    return struct.pack("<I", value)[:3]
