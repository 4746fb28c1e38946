"""A memory of digests that is damaged, wrong, another's or not to be written costs time only."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from pathlib import Path

import pytest

from gentron import digests
from gentron.digests import first_differing, remember


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def memory_file(home: Path) -> Path:
    return home / "gentron" / digests.MEMORY


# --- wrong contents ---


def test_reading_anew_finds_what_memory_would_hide_and_corrects_it(
    folder: Path, wanted: dict[str, str], impatient: None
) -> None:
    """As after a fault of the disk, which changes contents and no dates."""
    (folder / "b").write_bytes(b"OTHER")
    remember({folder / "b": wanted["b"]})
    assert first_differing(folder, wanted) is None
    assert first_differing(folder, wanted, anew=True) == "b"
    assert first_differing(folder, wanted) == "b"


def test_memory_alone_never_refuses_a_file(
    folder: Path, wanted: dict[str, str], hashed: list[str], impatient: None
) -> None:
    remember({folder / name: sha256(b"nonsense") for name in wanted})
    for _ in range(2):
        assert first_differing(folder, wanted) is None
    assert hashed == ["a", "b", "c"]


BROKEN_MEMORIES = (
    *(b"", b"{", b"null", b"3", b'"text"', b'{"files": []}', b"[3]", b"[[]]", b"\xff\xfe\x00"),
    *(b'[[1, 2, 3, 4, 5, 6]]', b'[[1, 2, 3, 4, "5", "00"]]', b'[[1, 2, 3, 4, "00"]]'),
    *(b'[[1, 2, 3, 4, 5.0, "00"]]', b'[[true, 2, 3, 4, 5, "00"]]', b"[" * 100_000),
    b"[" + b" " * digests.MAX_SIZE + b"]",
)  # fmt: skip


@pytest.mark.parametrize("text", BROKEN_MEMORIES, ids=lambda text: repr(text[:24]))
def test_a_damaged_memory_costs_one_warning_and_one_reading(
    folder: Path,
    wanted: dict[str, str],
    home: Path,
    hashed: list[str],
    impatient: None,
    caplog: pytest.LogCaptureFixture,
    text: bytes,
) -> None:
    memory_file(home).parent.mkdir(mode=0o700)
    memory_file(home).write_bytes(text)
    for _ in range(2):
        assert first_differing(folder, wanted) is None
    assert hashed == ["a", "b", "c"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{memory_file(home)}: damaged" in record.getMessage()


def test_no_flipped_bit_of_a_memory_changes_an_answer(
    folder: Path, wanted: dict[str, str], home: Path, impatient: None
) -> None:
    first_differing(folder, wanted)
    good, chance = memory_file(home).read_bytes(), random.Random(0)
    (folder / "c").write_bytes(b"the THIRD")
    for _ in range(100):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        memory_file(home).write_bytes(data)
        assert first_differing(folder, {name: wanted[name] for name in "ab"}) is None
        assert first_differing(folder, wanted) == "c"


# --- a folder that cannot be used ---


@pytest.mark.parametrize("where", ["/proc/gentron-cache", "FILE", "FILE/below"])
def test_a_cache_folder_that_cannot_be_written_costs_one_warning(
    folder: Path,
    wanted: dict[str, str],
    hashed: list[str],
    impatient: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    (tmp_path / "FILE").touch(mode=0o600)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / where))
    for _ in range(2):
        assert first_differing(folder, wanted) is None
    assert hashed == ["a", "b", "c"] * 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot be remembered" in record.getMessage()
    assert "set XDG_CACHE_HOME" in record.getMessage()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_memory_and_nothing_else(
    folder: Path,
    wanted: dict[str, str],
    home: Path,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    first_differing(folder, {"a": wanted["a"]})
    before = memory_file(home).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    assert first_differing(folder, wanted) is None
    assert [file.read_bytes() for file in memory_file(home).parent.iterdir()] == [before]
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
@pytest.mark.parametrize("which", ["base", "folder", "file"])
def test_a_memory_that_others_can_write_is_not_believed(
    folder: Path,
    wanted: dict[str, str],
    home: Path,
    impatient: None,
    caplog: pytest.LogCaptureFixture,
    which: str,
    mode: int,
) -> None:
    (folder / "b").write_bytes(b"OTHER")
    remember({folder / "b": wanted["b"]})
    assert first_differing(folder, wanted) is None  # believed as long as it is ours
    open_one = {"base": home, "folder": home / "gentron", "file": memory_file(home)}[which]
    open_one.chmod(mode)
    assert first_differing(folder, wanted) == "b"
    (record,) = caplog.records
    assert f"run: chmod go-w '{open_one}'" in record.getMessage()


def test_the_memory_of_another_user_is_not_believed(
    folder: Path,
    wanted: dict[str, str],
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (folder / "b").write_bytes(b"OTHER")
    remember({folder / "b": wanted["b"]})
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert first_differing(folder, wanted) == "b"
    assert "belongs to another user" in caplog.text


def test_folder_and_file_are_the_users_alone(
    folder: Path, wanted: dict[str, str], home: Path, impatient: None
) -> None:
    home.rmdir()
    before = os.umask(0)
    try:
        first_differing(folder, wanted)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (home, home / "gentron", memory_file(home))]
    assert modes == [0o700, 0o700, 0o600]
    assert os.listdir(home / "gentron") == [digests.MEMORY]


@pytest.mark.parametrize("value", [None, "", "relative/folder"])
def test_without_an_absolute_cache_folder_it_is_the_one_in_the_home(
    folder: Path,
    wanted: dict[str, str],
    impatient: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: str | None,
) -> None:
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    first_differing(folder, wanted)
    assert memory_file(tmp_path / ".cache").is_file()
    assert sorted(os.listdir(folder)) == ["a", "b", "c"]
