"""A component exported in a process of its own: its memory ends with it, and can be measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gentron import errors
from gentron.errors import GenTronError, ResourceError
from gentron.export.component import Exported, Progress, peak_bytes

FAILED = 3  # exit status of a worker whose last line is an error of ours
LAST_LINES = 20


def export_isolated(
    folder: Path, notes: Path, component: str, precisions: Sequence[str], progress: Progress
) -> Exported:
    """As `export_component`, which the worker calls; raises what it raises, and ResourceError
    if the process was killed."""
    log = notes / f"{component}.log"
    command = [sys.executable, "-m", "gentron.export.worker", str(folder), str(notes), component]
    with log.open("w") as complaints:
        process = subprocess.Popen(
            [*command, ",".join(precisions)],
            stdin=subprocess.PIPE,  # closed by the system when we end, however we end
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
    assert process.stdout is not None
    message: dict[str, object] = {}
    peak = 0
    try:
        for line in process.stdout:
            message = json.loads(line)
            if "doing" in message:
                peak = int(str(message["peak"]))
                progress(component, str(message["doing"]), float(str(message["share"])))
    except BaseException:
        process.kill()
        raise
    finally:
        # Not Popen.wait: only wait4 tells how much memory the process had.
        _, status, usage = os.wait4(process.pid, 0)
        if usage.ru_maxrss * 1024 > peak_bytes():  # else it may be ours: see peak_bytes
            peak = max(peak, usage.ru_maxrss * 1024)
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
    if process.returncode == 0:
        log.unlink()
        return Exported.from_json(json.dumps(message["exported"]))
    if process.returncode == FAILED and "error" in message:
        raise _error(str(message["error"]), str(message["text"]))
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise ResourceError(
            f"{component}: its process was killed ({name}) while it held "
            f"{peak / 1e9:.2f} GB; SIGKILL is mostly the system running out of "
            "memory: close other programs, then repeat the command with --resume"
        )
    tail = log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:]
    raise AssertionError(f"{component}: the export process failed:\n" + "\n".join(tail))


def _error(name: str, text: str) -> GenTronError:
    """The worker's error under its own class, so that callers need not know of processes."""
    kind = getattr(errors, name)
    assert issubclass(kind, GenTronError), name
    found: GenTronError = kind.__new__(kind)
    Exception.__init__(found, text)
    return found
