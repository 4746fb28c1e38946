"""What a `Range` header asks for."""

from __future__ import annotations

import pytest
from fastapi import HTTPException

from gentron.runtime.http_ranges import asked_range


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-", (0, 10)),
        ("bytes=0-0", (0, 1)),
        ("bytes=3-5", (3, 6)),
        ("bytes=3-999", (3, 10)),
        ("bytes=-4", (6, 10)),
        ("bytes=-999", (0, 10)),
    ],
)
def test_a_part_of_ten_bytes(header, part):
    assert asked_range(header, 10) == part


@pytest.mark.parametrize(
    "header",
    [
        "",
        "bytes=-",
        "bytes=5-3",
        "bytes=0-1,3-4",
        "bytes=a-b",
        "bytes=0-" + "9" * 5000,
        "lines=0-1",
        "bytes=\u0663-",
    ],
)
def test_what_is_no_single_range_is_answered_with_all(header):
    assert asked_range(header, 10) is None


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0)])
def test_a_range_without_a_byte_says_how_many_there_are(header, size):
    with pytest.raises(HTTPException) as refused:
        asked_range(header, size)
    assert (refused.value.status_code, refused.value.headers) == (
        416,
        {"Content-Range": f"bytes */{size}"},
    )
