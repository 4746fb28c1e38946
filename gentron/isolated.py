"""Heavy work in a process of its own: its memory ends with it, and the system may kill it alone.

The child speaks lines of JSON on standard output: what it is doing, then its result or an error of
ours. Its standard input stays open as long as the parent lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentron import errors
from gentron.errors import GenTronError, ResourceError

FAILED = 3  # exit status of a child whose last line is an error of ours
LAST_LINES = 20
Watch = Callable[[str, float, int], None]  # what is being done, share done, bytes held at most


@dataclass(frozen=True)
class Finished:
    result: Any  # JSON values
    peak_bytes: int  # of the child's own memory; 0 if it cannot be told from ours


def run_isolated(
    what: str,
    module: str,
    arguments: Sequence[str],
    log: Path,
    watch: Watch,
    *,
    payload: bytes = b"",
    again: str = "repeat the command",
) -> Finished:
    """Runs `python -m MODULE ARGUMENTS` to its end; whatever stops us kills it.

    The child's complaints go to `log`, which is removed if all went well. Raises what the child
    raised, if it is one of our errors, and ResourceError if it was killed.
    """
    ours = _own_peak()
    with log.open("w") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,  # closed by the system when we end, however we end
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,  # Ctrl-C reaches us, and we kill it
        )
    assert process.stdin is not None
    assert process.stdout is not None
    message: dict[str, Any] = {}
    peak = 0
    try:
        process.stdin.write(len(payload).to_bytes(8, "big") + payload)
        process.stdin.flush()
        for line in process.stdout:
            message = json.loads(line)
            if "doing" in message:
                peak = int(message["peak"])
                watch(str(message["doing"]), float(message["share"]), peak)
    except BrokenPipeError:
        pass  # it ended before it read: its exit status says why
    except BaseException:
        process.kill()
        raise
    finally:
        # Not Popen.wait: only wait4 tells how much memory the process had.
        _, status, usage = os.wait4(process.pid, 0)
        if usage.ru_maxrss * 1024 > ours:  # else it may be what it had of us before it began
            peak = max(peak, usage.ru_maxrss * 1024)
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    if process.returncode == 0:
        log.unlink()
        return Finished(message["result"], peak)
    if process.returncode == FAILED and "error" in message:
        raise known_error(str(message["error"]), str(message["text"]))
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise ResourceError(
            f"{what}: its process was killed ({name}) while it held {peak / 1e9:.2f} GB; SIGKILL "
            "is mostly the system running out of memory: close other programs, then " + again
        )
    tail = log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:]
    raise AssertionError(f"{what}: its process failed:\n" + "\n".join(tail))


def serve(work: Callable[[bytes, Watch], Any]) -> int:
    """The child's side: reads the payload, runs `work`, says how it went; an exit status."""
    length = int.from_bytes(sys.stdin.buffer.read(8), "big")
    payload = sys.stdin.buffer.read(length)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def watch(doing: str, share: float, peak: int) -> None:
        _say({"doing": doing, "share": share, "peak": peak})

    try:
        result = work(payload, watch)
    except GenTronError as error:
        _say({"error": type(error).__name__, "text": str(error)})
        return FAILED
    _say({"result": result})
    return 0


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """Standard input ends when the parent does, even if it was killed."""
    while os.read(0, 4096):  # not through `sys.stdin`, which exiting Python would wait for
        pass
    os._exit(1)


def _own_peak() -> int:
    """A child starts with our pages, and its peak counts them."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def known_error(name: str, text: str) -> GenTronError:
    """The child's error under its own class, so that callers need not know of processes."""
    kind = getattr(errors, name)
    assert issubclass(kind, GenTronError), name
    found: GenTronError = kind.__new__(kind)
    Exception.__init__(found, text)
    return found
