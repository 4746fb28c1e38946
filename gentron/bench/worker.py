"""`python -m gentron.bench.worker KIND`: one contender in a process of its own.

It reads lines of JSON from standard input, the work first and then what to do with it, and answers
each with one line. It ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gentron.bench.runner import Runner
from gentron.bench.work import Work
from gentron.engines.host_memory import peak_bytes
from gentron.errors import GenTronError

SHORT = 0.1  # seconds; shorter calls get one that does not count first, to wake threads and caches


def runner(kind: str, work: Work) -> Runner:
    """Imports no more than this kind needs."""
    if kind.startswith("torch"):
        from gentron.bench.torch_peer import TorchRunner

        return TorchRunner(work, compiled=kind.endswith("-compile"))
    if kind.startswith("diffusers"):
        from gentron.bench.diffusers_peer import PixArtRunner

        return PixArtRunner(work, compiled=kind.endswith("-compile"))
    if kind == "machine":
        from gentron.bench.machine import GemmRunner

        return GemmRunner(work)
    from gentron.bench.ours import EngineRunner

    return EngineRunner(work, kind)


def timed(run: Callable[[], float | None], seconds: float) -> list[float]:
    """Times of single runs until they fill `seconds`; one at least."""
    found, whole = list[float](), 0.0
    while not found or whole < seconds:
        started = time.perf_counter()
        part = run()
        taken = time.perf_counter() - started
        whole += taken
        found.append(taken if part is None else part)
    return found


def serve(make: Callable[[str], Runner]) -> int:
    """Makes the runner from the first line, then answers until there are no more; an exit
    status. Answers go to the descriptor that was standard output, which is standard error from
    here on: libraries print."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        return _serve(make, answers)


def _serve(make: Callable[[str], Runner], answers: BinaryIO) -> int:
    def answer(**values: Any) -> None:
        answers.write(json.dumps(values).encode() + b"\n")
        answers.flush()

    try:
        started = time.perf_counter()
        made = make(sys.stdin.readline())
        made.run()
        ready = time.perf_counter() - started
        last = timed(made.run, 0)[0]
        answer(facts=made.facts, prepare_s=ready)
        for line in sys.stdin:
            asked = json.loads(line)
            if "seconds" in asked:
                if last < SHORT:
                    made.run()
                times = timed(made.run, asked["seconds"])
                last = times[-1]
                answer(times=times, peak=peak_bytes())
            else:
                np.savez(Path(asked["outputs"]), **made.outputs())  # type: ignore[arg-type]
                answer(written=True)
        made.close()
    except GenTronError as error:
        answer(error=type(error).__name__, text=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(serve(lambda line: runner(sys.argv[1], Work.from_json(line))))
