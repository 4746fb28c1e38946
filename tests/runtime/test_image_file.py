"""PNG files: what they carry comes back, none is ever lost, and none is ever half there."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gentron.errors import OutputError, RequestError
from gentron.runtime.image_file import (
    check_target,
    default_name,
    encode_png,
    read_metadata,
    save_png,
)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
METADATA = {
    "prompt": 'кошка, 新聞を読む猫, قطة 🐱📰 "quoted" \\ \0 \n \u2028',
    "negative": "",
    "seed": 2**64 - 1,
    "guidance": 0.1 + 0.2,
    "batch": 1,
    "engines": {"denoiser": {"backend": "onnxruntime"}},
}


def picture(value: int = 0, side: int = 16) -> Pixels:
    """[side, side, 3], another one for each value."""
    return np.random.default_rng(value).integers(0, 256, (side, side, 3), np.uint8)


def opened(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def test_metadata_of_any_script_comes_back(tmp_path: Path) -> None:
    file = save_png(picture(), METADATA, output=tmp_path / "x.png", name="unused")
    assert read_metadata(file) == METADATA
    assert np.array_equal(opened(file.read_bytes()), picture())


def test_metadata_is_readable_text_for_other_programs(tmp_path: Path) -> None:
    with Image.open(io.BytesIO(encode_png(picture(), METADATA))) as image:
        assert "新聞を読む猫" in image.text["gentron"]  # type: ignore[attr-defined]


def test_a_picture_is_kept_exactly_and_the_same_bytes_are_made_again() -> None:
    tall = np.ascontiguousarray(picture(side=32)[:, :20])
    data = encode_png(tall, METADATA)
    assert np.array_equal(opened(data), tall)
    assert encode_png(tall, METADATA) == data


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "3"])
def test_a_picture_whose_settings_are_no_object_is_refused(tmp_path: Path, text: str) -> None:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("gentron", text)
    Image.fromarray(picture()).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(
        RequestError, match=r"x\.png: carries no settings.*gentron-run video --like"
    ):
        read_metadata(tmp_path / "x.png")


def test_eight_threads_that_want_one_name_get_eight_files(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def save(value: int) -> Path:
        barrier.wait()
        return save_png(picture(value), {"value": value}, output=tmp_path, name="cat")

    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            files = list(pool.map(save, range(8)))
        assert len(set(files)) == 8
        for value, file in enumerate(files):
            assert read_metadata(file) == {"value": value}
            assert np.array_equal(opened(file.read_bytes()), picture(value))
    names = {"cat.png"} | {f"cat-{number}.png" for number in range(2, 25)}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_a_file_that_is_replaced_is_whole_at_any_moment(tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    valid = {encode_png(picture(value, 64), {}) for value in range(2)}
    done = threading.Event()

    def replace() -> None:
        for turn in range(60):
            save_png(picture(turn % 2, 64), {}, output=target, name="unused")
        done.set()

    save_png(picture(0, 64), {}, output=target, name="unused")
    seen = set()
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(replace)
        while not done.is_set() and not written.done():
            seen.add(target.read_bytes())
        written.result()
    assert seen == valid  # both were seen, and nothing else
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_file_of_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = tmp_path / "x.png"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail_with(FULL))
    with pytest.raises(OutputError, match=r"x\.png: cannot be written: No space left on device"):
        save_png(picture(), METADATA, output=target, name="unused")
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"x.png": b"old"}


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_failure_in_a_folder_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, fail_with(FULL))
    with pytest.raises(OutputError, match=r"cat\.png: cannot be written: No space left on device"):
        save_png(picture(), METADATA, output=tmp_path, name="cat")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["x.png", ""])
def test_an_interruption_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_png(picture(), METADATA, output=tmp_path / output, name="cat")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_holds_pictures_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """FAT, exFAT and many network folders know none."""
    monkeypatch.setattr(os, "link", fail_with(OSError(code, os.strerror(code))))
    files = [save_png(picture(v), {}, output=tmp_path, name="cat") for v in range(2)]
    assert [file.name for file in files] == ["cat.png", "cat-2.png"]
    for value, file in enumerate(files):
        assert np.array_equal(opened(file.read_bytes()), picture(value))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"gone/x\.png: cannot be written"):
        save_png(picture(), METADATA, output=tmp_path / "gone" / "x.png", name="unused")


def test_a_file_has_the_permissions_that_others_in_the_folder_get(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    usual = (tmp_path / "usual").stat().st_mode
    assert save_png(picture(), {}, output=tmp_path, name="cat").stat().st_mode == usual
    assert save_png(picture(), {}, output=tmp_path / "x.png", name="").stat().st_mode == usual


@pytest.mark.parametrize("name", ["x.PNG", "x.png", "a.b.png"])
def test_a_target_with_the_known_suffix_is_accepted(tmp_path: Path, name: str) -> None:
    check_target(tmp_path / name, 1)


def test_a_folder_is_a_target_for_any_number(tmp_path: Path) -> None:
    check_target(tmp_path, 64)
    check_target(None, 64)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A cat, reading a newspaper.", "a-cat-reading-a-newspaper-7"),
        ("кошка", "кошка-7"),
        ("../../x", "x-7"),
        ("  ", "empty-7"),
        ("", "empty-7"),
        ("snake_case", "snake-case-7"),
    ],
)
def test_a_name_is_made_of_words_and_seed(prompt: str, name: str) -> None:
    assert default_name(prompt, 7) == name


@pytest.mark.parametrize("letter", ["a", "я", "猫", "\U00020000"])
def test_a_name_fits_in_a_file_system_with_its_number_and_suffix(letter: str) -> None:
    name = default_name(letter * 1000, 2**64 - 1)
    assert len(f"{name}-99999.png".encode()) <= 255
    assert name.endswith(f"-{2**64 - 1}")
    assert name.startswith(letter * 20)
