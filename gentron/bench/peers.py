"""Contenders that need torch: what they need installed, and the allocator that suits them."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
from pathlib import Path

from gentron.errors import RequestError

PEERS = {  # name -> packages it imports
    "torch": ("torch", "diffusers", "transformers", "einops"),
    "torch-compile": ("torch", "diffusers", "transformers", "einops"),
    "diffusers": ("torch", "diffusers"),
    "diffusers-compile": ("torch", "diffusers"),
}
LIBRARY_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
)
TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
PRELOAD = "LD_PRELOAD"


def check_peers(names: tuple[str, ...]) -> None:
    """Raises RequestError for an unknown one, or one whose packages are not installed."""
    for name in names:
        if name not in PEERS:
            raise RequestError("against", f"unknown peer {name!r}; one of {', '.join(PEERS)}")
        missing = [p for p in PEERS[name] if importlib.util.find_spec(p) is None]
        if missing:
            raise RequestError(
                "against",
                f"{name} needs {', '.join(missing)}; run: pip install 'gentron[export]'",
            )


def tcmalloc() -> str | None:
    """The library's path or name; torch frees and asks for large blocks all the time, which the
    system's allocator answers with fresh pages each time."""
    for folder in LIBRARY_FOLDERS:
        for name in TCMALLOC:
            if (Path(folder) / name).exists():
                return str(Path(folder) / name)
    return ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")


def environment(kind: str, threads: int) -> dict[str, str]:
    """Of a contender's process."""
    own = dict(os.environ)
    if kind in PEERS:
        own |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        own |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if PRELOAD not in own and (library := tcmalloc()):
            own[PRELOAD] = library
    return own


def allocator() -> str:
    """For labels, in the contender's own process: which allocator it really has."""
    maps = Path("/proc/self/maps")
    loaded = maps.exists() and "tcmalloc" in maps.read_text()
    return ", tcmalloc" if loaded else ", the system's allocator"
