"""Remembered digests spare reading, and never let a changed file through."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gentron import digests
from gentron.digests import Identity, first_differing, remember
from gentron.errors import BundleError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def memory_file(home: Path) -> Path:
    return home / "gentron" / digests.MEMORY


# --- reading once ---


def test_files_are_read_once(
    folder: Path, wanted: dict[str, str], hashed: list[str], impatient: None
) -> None:
    assert first_differing(folder, wanted) is None
    assert hashed == ["a", "b", "c"]
    assert first_differing(folder, wanted) is None
    assert hashed == ["a", "b", "c"]
    assert first_differing(folder, wanted, anew=True) is None
    assert hashed == ["a", "b", "c"] * 2


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux's count of bytes read")
def test_a_second_look_takes_no_bytes_from_the_files(folder: Path, impatient: None) -> None:
    data = bytes(8_000_000)
    (folder / "big").write_bytes(data)

    def bytes_read() -> int:
        before = _read_by_this_process()
        assert first_differing(folder, {"big": sha256(data)}) is None
        return _read_by_this_process() - before

    assert bytes_read() > len(data)
    assert bytes_read() < 100_000  # the memory


def _read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # "rchar: N"


def test_a_renamed_folder_is_not_read_again(
    folder: Path, wanted: dict[str, str], hashed: list[str], impatient: None
) -> None:
    first_differing(folder, wanted)
    assert first_differing(folder.rename(folder.with_name("elsewhere")), wanted) is None
    assert hashed == ["a", "b", "c"]


def test_what_was_read_before_an_interruption_is_kept(
    folder: Path, wanted: dict[str, str], impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = hashlib.file_digest

    def interrupted(stream: Any, kind: str) -> Any:
        if stream.name.endswith("b"):
            raise KeyboardInterrupt
        return original(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first_differing(folder, wanted)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert first_differing(folder, {"a": wanted["a"]}) is None


def test_digests_that_a_writer_computed_spare_the_first_reading(
    folder: Path, wanted: dict[str, str], hashed: list[str], impatient: None
) -> None:
    remember({folder / name: digest for name, digest in wanted.items()})
    assert first_differing(folder, wanted) is None
    assert hashed == []


def test_a_gigabyte_is_announced_once(
    folder: Path,
    wanted: dict[str, str],
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(digests, "LARGE", 18)  # the three files have 19 bytes
    for _ in range(2):
        assert first_differing(folder, wanted) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{folder}: reading 0.0 GB to check its files; ")


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"files/gone: cannot be read: .*; check its permissions"):
        first_differing(folder, {"gone": sha256(b"")})


# --- changed files ---


def later(file: Path, data: bytes) -> None:
    """An ordinary edit: other contents, later time."""
    file.write_bytes(data)
    os.utime(file, ns=(time.time_ns(), time.time_ns()))


def behind_dates(file: Path, data: bytes) -> None:
    """Size and mtime are as before; only ctime, which no program can set, tells."""
    before = file.stat()
    time.sleep(0.05)  # more than a tick of the filesystem's clock
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_ctime_ns != before.st_ctime_ns


def by_rename(file: Path, data: bytes) -> None:
    """Another file of the same size and mtime takes its place."""
    before, other = file.stat(), file.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)


@pytest.mark.parametrize("change", [later, behind_dates, by_rename])
def test_a_file_with_other_contents_of_the_same_size_is_found(
    folder: Path, wanted: dict[str, str], impatient: None, change: Callable[[Path, bytes], None]
) -> None:
    assert first_differing(folder, wanted) is None
    change(folder / "b", b"OTHER")
    assert first_differing(folder, wanted) == "b"
    assert first_differing(folder, wanted) == "b"  # and is not remembered as right
    (folder / "b").write_bytes(b"other")
    assert first_differing(folder, wanted) is None


def test_two_files_swapped_are_found(
    folder: Path, wanted: dict[str, str], impatient: None, tmp_path: Path
) -> None:
    for name in wanted:
        os.utime(folder / name, ns=(10**18, 10**18))
    assert first_differing(folder, wanted) is None
    (folder / "a").rename(tmp_path / "spare")
    (folder / "b").rename(folder / "a")
    (tmp_path / "spare").rename(folder / "b")
    assert first_differing(folder, wanted) == "a"


def test_a_file_just_written_is_not_remembered(
    folder: Path, wanted: dict[str, str], hashed: list[str]
) -> None:
    """An edit in the same tick of the clock would leave its times as they are."""
    os.utime(folder / "b", ns=(10**18, 10**18))  # an old mtime; ctime still says now
    for _ in range(2):
        assert first_differing(folder, wanted) is None
    remember({folder / name: digest for name, digest in wanted.items()})
    assert first_differing(folder, wanted) is None
    assert hashed == ["a", "b", "c"] * 3


SECOND, NOW = 10**9, 1_700_000_000 * 10**9


@pytest.mark.parametrize(
    ("mtime_age", "ctime_age", "settled"),
    [
        (3.0, 3.0, True),
        (2.0, 3.0, False),  # FAT keeps even seconds only
        (3.0, 2.0, False),  # a copy that kept its date
        (0.0, 0.0, False),
        (-3600.0, 3.0, False),  # a date to come
        (1e9, 3.0, True),
    ],
)
def test_a_file_is_settled_once_both_times_are_over_two_seconds_old(
    mtime_age: float, ctime_age: float, settled: bool
) -> None:
    times = [int(NOW - age * SECOND) for age in (mtime_age, ctime_age)]
    assert Identity(1, 1, 1, *times).settled(NOW) == settled


def test_a_file_that_changes_while_it_is_read_is_read_again(
    folder: Path, wanted: dict[str, str], impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = hashlib.file_digest

    def overtaken(stream: Any, kind: str) -> Any:
        digest = original(stream, kind)
        behind_dates(Path(stream.name), b"OTHER")
        return digest

    monkeypatch.setattr(hashlib, "file_digest", overtaken)
    assert first_differing(folder, {"b": wanted["b"]}) is None  # it was right when it was read
    monkeypatch.setattr(hashlib, "file_digest", original)
    assert first_differing(folder, {"b": wanted["b"]}) == "b"


# --- many entries, several processes ---


def test_the_oldest_entries_are_dropped(
    folder: Path, hashed: list[str], impatient: None, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(digests, "MAX_ENTRIES", 4)
    names = "abcdef"
    for name in names:
        (folder / name).write_bytes(name.encode())
        first_differing(folder, {name: sha256(name.encode())})
    later(folder / "d", b"D")
    first_differing(folder, {"d": sha256(b"D")})  # in place of its former self
    rows = json.loads(memory_file(home).read_text())
    assert [row[1] for row in rows] == [(folder / name).stat().st_ino for name in "cefd"]
    hashed.clear()
    assert first_differing(folder, {name: sha256(name.encode()) for name in "cef"}) is None
    assert hashed == []
    assert first_differing(folder, {"a": sha256(b"a")}) is None
    assert hashed == ["a"]


def test_what_another_process_remembers_in_the_meantime_is_kept(
    folder: Path,
    wanted: dict[str, str],
    hashed: list[str],
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = hashlib.file_digest

    def overtaken(stream: Any, kind: str) -> Any:
        remember({folder / "c": wanted["c"]})
        return counted(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", overtaken)
    first_differing(folder, {"a": wanted["a"]})
    monkeypatch.setattr(hashlib, "file_digest", counted)
    assert first_differing(folder, {name: wanted[name] for name in "ac"}) is None
    assert hashed == ["a"]


RACE = 60  # files each
RACER = """
import hashlib, sys
from pathlib import Path
from gentron import digests
digests.SETTLED_NS = 0
folder = Path(sys.argv[1])
for file in sorted(folder.glob(sys.argv[2] + "*")):
    wanted = {file.name: hashlib.sha256(file.name.encode()).hexdigest()}
    assert digests.first_differing(folder, wanted) is None
"""


def test_two_processes_at_once_never_leave_a_damaged_memory(folder: Path, home: Path) -> None:
    for name in (f"{who}{i:03}" for who in "xy" for i in range(RACE)):
        (folder / name).write_bytes(name.encode())
    command = [sys.executable, "-c", RACER, str(folder)]
    racers = [subprocess.Popen([*command, who], stderr=subprocess.PIPE, text=True) for who in "xy"]
    while any(racer.poll() is None for racer in racers):
        if memory_file(home).exists():
            digests._load(memory_file(home))  # raises if it is damaged
    for racer in racers:
        _, complaint = racer.communicate()
        assert (racer.returncode, complaint) == (0, "")  # no warning either
    assert os.listdir(home / "gentron") == [digests.MEMORY]
    right = {file.stat().st_ino: sha256(file.name.encode()) for file in folder.iterdir()}
    rows = json.loads(memory_file(home).read_text())
    assert all(right[row[1]] == row[-1] for row in rows)
    last = [(folder / f"{who}{RACE - 1:03}").stat().st_ino for who in "xy"]
    assert rows[-1][1] in last  # one may lose the other's entries, never its own last
