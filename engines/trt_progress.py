"""A TensorRT build that shows how far it is and can be stopped.

TensorRT builds in a thread of its own, without the interpreter's lock, and tells a monitor of its
nested phases; the thread that asked for the engine waits, reports, and hears Ctrl-C.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from gentron.engines.compiler import Report

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between reports

Result = TypeVar("Result")


# Where the time goes, as parts of the whole: phases by TensorRT's names for them. Tuning takes it
# in TensorRT, and passes in no time in TensorRT-RTX, which makes its kernels in the one step that
# it calls "Determining refit engines". Phases around these say nothing more; unknown ones are
# shown by name and leave the share as it is.
SPANS = {
    "Cloning network graph": (0.0, 0.01),
    "Preparing graph for optimization": (0.01, 0.02),
    "Optimizing graph": (0.02, 0.05),
    "Timing graph nodes": (0.05, 0.45),
    "Timing tensor reformats": (0.45, 0.5),
    "Determining refit engines": (0.5, 0.75),
}
WRITING = (0.75, 1.0)  # of the plan, which TensorRT makes before the first byte is written


class BuildProgress:
    """What is being done, and a share of the whole that never falls. Safe in any thread.

    Steps are not equally long, and TensorRT does not say how long: the share is no clock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: list[tuple[str, int]] = []  # name, steps; under way, outermost first
        self._doing, self._share = "starting", 0.0
        self._cancelled = False
        self.error: BaseException | None = None  # raised inside a callback of TensorRT

    def doing(self, what: str) -> None:
        with self._lock:
            self._doing = what

    def now(self) -> tuple[str, float]:
        """(what is being done, share done)"""
        with self._lock:
            return self._doing, self._share

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self, error: BaseException | None = None) -> None:
        """TensorRT stops after its current step; `error` is kept for whoever waits."""
        self.error = self.error or error
        self._cancelled = True

    def start(self, name: str, steps: int) -> None:
        with self._lock:
            self._phases.append((name, max(1, steps)))
            self._doing = name

    def step(self, name: str, step: int) -> bool:
        """Step `step`, counted from 0, of a phase is done; False: stop."""
        with self._lock:
            steps = next((n for phase, n in reversed(self._phases) if phase == name), None)
            if steps is not None and name in SPANS:
                self._reach(SPANS[name], (step + 1) / steps)
        return not self._cancelled

    def finish(self, name: str) -> None:
        with self._lock:
            for index in reversed(range(len(self._phases))):
                if self._phases[index][0] == name:
                    del self._phases[index]
                    break
            if name in SPANS:
                self._reach(SPANS[name], 1.0)
            if self._phases:
                self._doing = self._phases[-1][0]

    def wrote(self, done: int, expected: int) -> None:
        """Bytes of the plan so far, of about so many."""
        with self._lock:
            self._doing = "writing the engine"
            self._reach(WRITING, done / max(1, expected))

    def _reach(self, span: tuple[float, float], part: float) -> None:
        first, last = span
        self._share = max(self._share, first + (last - first) * min(1.0, part))


def make_monitor(trt: Any, progress: BuildProgress) -> Any:
    """An IProgressMonitor of that module. What goes wrong in it cancels the build: an exception
    must not travel through TensorRT, which would print it and lose it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # of a module chosen at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, _parent: str | None, num_steps: int) -> None:
            try:
                progress.start(phase_name, num_steps)
            except Exception as error:
                progress.cancel(error)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                return progress.step(phase_name, step)
            except Exception as error:
                progress.cancel(error)
                return False

        def phase_finish(self, phase_name: str) -> None:
            try:
                progress.finish(phase_name)
            except Exception as error:
                progress.cancel(error)

    return Monitor()


def run_reporting(work: Callable[[], Result], progress: BuildProgress, report: Report) -> Result:
    """Runs `work` in a thread and reports from the calling one, which may be any.

    Whatever interrupts the wait (Ctrl-C, an exception of `report`) cancels the build, waits for its
    current step and is raised; else what `work` raised.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def build() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=build, name="tensorrt-build")
    shown: tuple[str, float] | None = None
    try:
        try:
            thread.start()  # Ctrl-C may come before this returns, with the thread running
        except RuntimeError:
            ended.set()  # there is no thread to wait for
            raise
        while not ended.wait(POLL):
            if (now := progress.now()) != shown:
                shown = now
                report(*now)
    except BaseException:
        progress.cancel()
        log.warning("stopping: TensorRT ends its current step first, minutes for a large model")
        raise
    finally:
        _wait_for(ended, progress)
    if errors:
        raise progress.error or errors[0]
    return results[0]


def _wait_for(ended: threading.Event, progress: BuildProgress) -> None:
    """A second Ctrl-C does not abandon the thread: TensorRT still writes into the folder.

    Not Thread.join, which takes a thread for ended once Ctrl-C has interrupted it (Python 3.11).
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            ended.wait()
            break
        except KeyboardInterrupt as error:
            progress.cancel()
            interrupt = error
    if interrupt is not None:
        raise interrupt
