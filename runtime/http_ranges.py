"""A file that is sent whole or in part: players of videos ask for parts, as do broken downloads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from fastapi import HTTPException, Request, Response
from fastapi.responses import StreamingResponse

CHUNK = 1 << 18  # bytes that are read at once
ONE_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", re.ASCII)


def file_response(request: Request, file: BinaryIO, media_type: str, tag: str) -> Response:
    """Answers a GET with the file, which it closes, or with the bytes that `Range` asks for.

    `tag` says which file it is, to a client that goes on with an earlier answer (`If-Range`).
    Raises HTTPException 416 for a range behind the end.
    """
    size = file.seek(0, 2)
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{tag}"'}
    asked = request.headers.get("range", "")
    if request.headers.get("if-range", headers["ETag"]) != headers["ETag"]:
        asked = ""
    try:
        part = asked_range(asked, size)
    except HTTPException:
        file.close()
        raise
    start, end = part or (0, size)
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    return StreamingResponse(
        _chunks(file, start, end), 206 if part else 200, media_type=media_type, headers=headers
    )


def asked_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last (RFC 9110, section 14.1.2). None where the whole file
    is the answer: to another unit, to several ranges, to what is no range.

    Raises HTTPException 416 for a range without a byte of the file.
    """
    found = ONE_RANGE.fullmatch(header)
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        message = f"Range: the file has {size} bytes; ask for some of them, or for all without it"
        raise HTTPException(416, message, {"Content-Range": f"bytes */{size}"})
    return start, end


def _chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while start < end and (chunk := file.read(min(CHUNK, end - start))):
            yield chunk
            start += len(chunk)
