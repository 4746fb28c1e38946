"""How much memory there is: of the machine, and of the container around the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from gentron.engines.host_memory import available_bytes, peak_bytes

MEMINFO = "MemTotal: 24000000 kB\nMemFree: 1 kB\nMemAvailable: 20000000 kB\n"


def machine(folder: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup."""
    proc, groups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    return proc, groups


def test_without_a_container_it_is_what_the_system_calls_available(tmp_path):
    assert available_bytes(*machine(tmp_path, "0::/\n", {})) == 20_000_000 * 1024


def test_an_unlimited_container_changes_nothing(tmp_path):
    files = {"a/memory.max": "max\n", "a/memory.current": "5\n"}
    assert available_bytes(*machine(tmp_path, "0::/a\n", files)) == 20_000_000 * 1024


def test_the_tightest_group_around_the_process_decides_and_its_file_pages_count_as_free(tmp_path):
    files = {
        "a/memory.max": "8000000000\n",
        "a/memory.current": "6000000000\n",
        "a/memory.stat": "anon 1\ninactive_file 500000000\n",
        "a/b/memory.max": "9000000000\n",
        "a/b/memory.current": "1000000000\n",
    }
    assert available_bytes(*machine(tmp_path, "0::/a/b\n", files)) == 2_500_000_000


def test_groups_of_the_first_version_are_read_too(tmp_path):
    files = {
        "memory/a/memory.limit_in_bytes": "3000000000\n",
        "memory/a/memory.usage_in_bytes": "1000000000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "1000000000\n",
    }
    listed = "5:cpu,cpuacct:/a\n4:memory:/a\n"
    assert available_bytes(*machine(tmp_path, listed, files)) == 2_000_000_000


def test_a_container_that_is_full_leaves_nothing(tmp_path):
    files = {"a/memory.max": "1000\n", "a/memory.current": "2000\n"}
    assert available_bytes(*machine(tmp_path, "0::/a\n", files)) == 0


def test_it_is_unknown_where_the_system_does_not_say(tmp_path):
    assert available_bytes(tmp_path, tmp_path) is None
    assert peak_bytes(tmp_path) is None


def test_this_process_has_held_memory_and_its_peak_never_falls():
    before = peak_bytes()
    if before is None:
        pytest.skip("no /proc")
    held = bytearray(64_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_bytes() >= before > 1_000_000
    assert peak_bytes() >= 64_000_000
