"""Prints the lines of the GPU's code that the tests on this machine do not run.

    python scripts/never_run.py [PYTEST ARGUMENTS]

Runs the tests of the GPU backends and watches which lines of `WATCHED` are reached; by default
everything that this machine can run (`-m tensorrt` and `-m rtx` on one with a GPU). A line that is
reached on the simulated GPU only has met our model of CUDA and TensorRT, and not theirs: the list
is what certainly was not run, not what certainly works. Exit code 0 whatever is found, 1 if a test
failed.
"""

from __future__ import annotations

import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import gentron.engines

ROOT = Path(__file__).resolve().parent.parent
ENGINES = Path(gentron.engines.__path__[0]).resolve()  # those that the tests import
WATCHED = sorted(
    file
    for name in (
        "device*.py",
        "trt_*.py",
        "onnxruntime_gpu.py",
        "onnxruntime_kept.py",
        "onnxruntime_providers.py",
    )
    for file in ENGINES.glob(name)
)
TESTS = ["tests/gpu", *sorted(str(f) for f in (ROOT / "tests" / "engines").glob("test_trt_*.py"))]

reached: defaultdict[str, set[int]] = defaultdict(set)
watched: dict[str, str | None] = {}  # by the name that code has of its file


def watch(frame: FrameType, _: str, __: Any) -> Any:
    """A trace function for the watched files alone."""
    name = frame.f_code.co_filename
    if name not in watched:
        file = Path(name).resolve()
        watched[name] = str(file) if file in WATCHED else None
    if (known := watched[name]) is None:
        return None
    reached[known].add(frame.f_lineno)
    return watch


def lines_of(code: CodeType) -> Iterator[int]:
    """Lines with something to run, in a module and everything defined in it."""
    first = code.co_firstlineno
    yield from (line for _, _, line in code.co_lines() if line and line != first)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from lines_of(constant)


def never_run(file: Path) -> list[int]:
    source = file.read_text("utf-8")
    text = source.splitlines()
    wanted = set(lines_of(compile(source, str(file), "exec")))
    missed = sorted(wanted - reached[str(file)])
    return [n for n in missed if not re.match(r'\s*(@|""")', text[n - 1])]


def main() -> int:
    arguments = sys.argv[1:] or ["-q", *TESTS]
    threading.settrace(watch)
    sys.settrace(watch)
    failed = pytest.main(arguments)
    sys.settrace(None)
    total = 0
    for file in WATCHED:
        text = file.read_text("utf-8").splitlines()
        for line in never_run(file):
            total += 1
            print(f"engines/{file.name}:{line}: {text[line - 1].strip()}")
    print(f"{total} lines of {len(WATCHED)} files were not run here")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
