"""How much memory this process may still take, and how much it has taken; known on Linux."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # what version 1 writes for no limit is of this order


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """What can be allocated without swapping, the container's limit included; None if unknown."""
    free = _status_bytes(proc / "meminfo", "MemAvailable")
    return None if free is None else max(0, min(free, *_container_room(proc, cgroups), UNLIMITED))


def peak_bytes(proc: Path = PROC) -> int | None:
    """The most memory this process has held so far, mapped files included; None if unknown."""
    return _status_bytes(proc / "self" / "status", "VmHWM")


def give_back() -> None:
    """Returns what was freed to the system, where the C library can (glibc): it would keep some of
    it for later, and what is loaded next asks how much is free."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(file: Path, name: str) -> int | None:
    if not file.exists():
        return None
    found = [line for line in file.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _container_room(proc: Path, cgroups: Path) -> Iterator[int]:
    """Limit less use of this process's control group and of those around it, versions 2 and 1."""
    listed = proc / "self" / "cgroup"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, idle = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit = cgroups / "memory", "memory.limit_in_bytes"
            used, idle = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if (folder / limit).exists() and (folder / used).exists():
                text = (folder / limit).read_text().strip()
                if text != "max" and int(text) < UNLIMITED:
                    kept = _cached(folder / "memory.stat", idle)
                    yield int(text) - int((folder / used).read_text()) + kept
            if folder == root:
                break


def _cached(file: Path, name: str) -> int:
    """Pages of files that the system gives back on demand."""
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
