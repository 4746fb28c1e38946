"""PNG files that carry what is needed to make them again, written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.errors import OutputError, RequestError

KEY = "gentron"  # the PNG text chunk: JSON, UTF-8
SUFFIXES = (".png",)


def check_target(
    output: Path | None, count: int, *, what: str = "images", suffixes: Sequence[str] = SUFFIXES
) -> None:
    """Before anything is computed: the folder exists, the suffix is known, one file for one image.

    `output` is a file or an existing folder; None means the current folder. Raises OutputError.
    """
    if output is None or is_folder(output):
        folder = output or Path()
    else:
        if output.suffix.lower() not in suffixes:
            raise OutputError(
                f"{output}: unknown suffix {output.suffix!r}; {what} are written as "
                f"{', '.join(suffixes)}, or name an existing folder"
            )
        if count > 1:
            raise OutputError(f"{output}: one file for {count} {what}; name an existing folder")
        folder = output.parent
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Raises OutputError unless files can be made in it."""
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; create it first (mkdir -p '{folder}')")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: not writable; choose another folder with -o")


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name that no file system takes
        raise OutputError(f"{path}: {error.strerror}; choose another name with -o") from error


def default_name(prompt: str, seed: int) -> str:
    """`a-cat-reading-a-newspaper-7` from prompt and seed; letters of any script stay."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    words = words[:60].encode()[:200].decode(errors="ignore")  # file systems count bytes
    return f"{words.rstrip('-') or 'empty'}-{seed}"


def save_png(
    image: npt.NDArray[np.uint8],
    metadata: dict[str, Any],
    *,
    output: Path | None,
    name: str,
) -> Path:
    """Writes one image [H, W, 3] with its metadata; returns the file.

    A file named by the caller is replaced; inside a folder the name is extended by a number
    rather than overwrite anything. Raises OutputError, and leaves nothing behind.
    """
    data = encode_png(image, metadata)
    if output is not None and not output.is_dir():
        return _write(data, output, replace=True)
    folder = output or Path()
    for number in range(1, 100_000):
        target = folder / (f"{name}.png" if number == 1 else f"{name}-{number}.png")
        try:
            return _write(data, target, replace=False)
        except FileExistsError:
            continue
    raise OutputError(f"{folder}: too many files named {name}; choose another folder with -o")


def encode_png(image: npt.NDArray[np.uint8], metadata: dict[str, Any]) -> bytes:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(metadata, ensure_ascii=False))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_metadata(file: Path) -> dict[str, Any]:
    """What `encode_png` stored; raises RequestError if the file is not one of ours."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            picture.load()
            text = getattr(picture, "text", {}).get(KEY)
    except FileNotFoundError as error:
        raise RequestError("like", f"{file}: no such file") from error
    except (
        OSError,
        UnidentifiedImageError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise RequestError("like", f"{file}: not a readable PNG: {error}") from error
    try:
        metadata = json.loads(text) if text else None
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise RequestError(
            "like",
            f"{file}: carries no settings; only images that gentron-run wrote can be repeated "
            "(videos: gentron-run video --like)",
        )
    return metadata


def move_to_new(temporary: Path, target: Path) -> None:
    """Fails if the name is taken, without a race."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # No hard links here (FAT, many network folders): take the name first, then fill it.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(temporary, target)
    else:
        os.unlink(temporary)


def _write(data: bytes, target: Path, *, replace: bool) -> Path:
    temporary = target.parent / f".{secrets.token_hex(8)}.part"
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            os.replace(temporary, target)
        else:
            move_to_new(temporary, target)
    except FileExistsError:
        os.unlink(temporary)
        raise
    except OSError as error:
        os.unlink(temporary)
        raise OutputError(
            f"{target}: cannot be written: {error.strerror}; free some space or choose another "
            "place with -o"
        ) from error
    except BaseException:
        os.unlink(temporary)
        raise
    return target
