"""A build in a thread: its share never falls, and whoever waits can stop it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from gentron.engines.trt_progress import SPANS, BuildProgress, run_reporting


def test_the_share_counts_the_steps_of_phases_within_phases():
    progress = BuildProgress()
    progress.start("Building engine", 6)
    progress.start("Timing graph nodes", 4)
    first, last = SPANS["Timing graph nodes"]
    for step in range(3):
        assert progress.step("Timing graph nodes", step)
        expected = first + (last - first) * (step + 1) / 4
        assert progress.now() == ("Timing graph nodes", pytest.approx(expected))
    progress.finish("Timing graph nodes")
    assert progress.now() == ("Building engine", pytest.approx(last))


def test_the_share_never_falls_and_ends_with_the_last_byte():
    progress, shares = BuildProgress(), []
    for name in ("Determining refit engines", "Optimizing graph", "a phase of later versions"):
        progress.start(name, 2)
        progress.step(name, 0)
        progress.finish(name)
        shares.append(progress.now()[1])
    for done in (10, 50, 100):
        progress.wrote(done, 100)
        shares.append(progress.now()[1])
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert progress.now()[0] == "writing the engine"


def test_the_same_phase_may_run_again_inside_itself():
    progress = BuildProgress()
    for _ in range(2):
        progress.start("Timing tactics", 3)
    progress.finish("Timing tactics")
    assert progress.now()[0] == "Timing tactics"
    progress.finish("Timing tactics")
    progress.finish("never started")


def test_after_a_cancel_every_step_says_stop():
    progress = BuildProgress()
    progress.start("Optimizing graph", 2)
    assert progress.step("Optimizing graph", 0) is True
    progress.cancel()
    assert progress.step("Optimizing graph", 1) is False
    assert progress.step("unknown", 0) is False


def test_the_result_and_the_error_of_the_thread_come_back():
    def fail():
        raise OSError("full")

    assert run_reporting(lambda: 42, BuildProgress(), lambda *_: None) == 42
    with pytest.raises(OSError, match="full"):
        run_reporting(fail, BuildProgress(), lambda *_: None)


def test_an_error_inside_a_callback_is_what_the_caller_sees():
    progress = BuildProgress()

    def fail():
        progress.cancel(MemoryError("in the monitor"))
        raise RuntimeError("the build failed")

    with pytest.raises(MemoryError, match="in the monitor"):
        run_reporting(fail, progress, lambda *_: None)


def long_work(progress: BuildProgress, seconds: float = 20) -> bool:
    """Whether it was cancelled before its time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if progress.cancelled:
            return True
        time.sleep(0.005)
    return False


def test_reports_come_from_the_thread_that_waits_and_only_when_something_changed():
    progress, seen = BuildProgress(), []

    def work():
        progress.doing("one thing")
        time.sleep(0.5)

    run_reporting(work, progress, lambda *now: seen.append((now, threading.get_ident())))
    assert {thread for _, thread in seen} == {threading.get_ident()}
    assert [now for now, _ in seen] == [("one thing", 0.0)]


def test_an_error_of_the_report_cancels_the_build_and_waits_for_it():
    progress, ended = BuildProgress(), []

    def report(doing, share):
        raise ValueError("nobody listens")

    with pytest.raises(ValueError, match="nobody listens"):
        run_reporting(lambda: ended.append(long_work(progress)), progress, report)
    assert ended == [True]
    assert not [t for t in threading.enumerate() if t.name == "tensorrt-build"]


def test_control_c_while_waiting_cancels_the_build_and_a_second_one_does_not_abandon_it():
    progress, ended = BuildProgress(), []

    def work():
        os.kill(os.getpid(), signal.SIGINT)
        long_work(progress)
        time.sleep(0.2)  # it is waiting for us now
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        ended.append(progress.cancelled)

    with pytest.raises(KeyboardInterrupt):
        run_reporting(work, progress, lambda *_: None)
    assert ended == [True]


def test_a_thread_that_cannot_be_made_is_not_waited_for(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_reporting(lambda: 1, BuildProgress(), lambda *_: None)


def test_it_works_when_the_caller_is_not_the_main_thread():
    results = []
    caller = threading.Thread(
        target=lambda: results.append(run_reporting(lambda: 1, BuildProgress(), lambda *_: None))
    )
    caller.start()
    caller.join(10)
    assert results == [1]
