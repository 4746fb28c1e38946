"""Work in a process of its own: results, errors and deaths arrive where the work was asked for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from gentron.errors import BackendError, RequestError, ResourceError
from gentron.isolated import Finished, run_isolated

CHILD = """
import os, sys, time
from gentron.errors import BackendError, RequestError
from gentron.isolated import serve

def work(payload, watch):
    what = sys.argv[1]
    watch("starting", 0.25, 1000)
    if what == "echo":
        return {"got": payload.decode(), "arguments": sys.argv[2:]}
    if what == "ours":
        raise RequestError("speed", "too fast")
    if what == "other":
        raise ValueError("a defect")
    if what == "silent exit":
        os._exit(7)
    if what == "memory":
        watch("holding a lot", 0.5, 10**15)
        return None
    if what == "deaf":
        os._exit(5)
    time.sleep(60)

sys.exit(serve(work))
"""


@pytest.fixture(autouse=True)
def child_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child_of_a_test.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def run(tmp_path, *arguments, payload=b"", watch=lambda *told: None) -> Finished:
    log = tmp_path / "child.log"
    return run_isolated("denoiser", "child_of_a_test", arguments, log, watch, payload=payload)


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children() if "child_of_a_test" in c.cmdline()]


def test_a_result_and_what_it_was_doing_come_back(tmp_path):
    told = []
    done = run(tmp_path, "echo", "one", payload=b"x" * 100_000, watch=lambda *t: told.append(t))
    assert done.result == {"got": "x" * 100_000, "arguments": ["one"]}
    assert told == [("starting", 0.25, 1000)]
    assert not (tmp_path / "child.log").exists()


def test_an_error_of_ours_arrives_as_itself(tmp_path):
    with pytest.raises(RequestError, match=r"^speed: too fast$"):
        run(tmp_path, "ours")


def test_a_defect_arrives_with_its_last_lines(tmp_path):
    with pytest.raises(AssertionError, match=r"denoiser: its process failed(.|\n)*a defect"):
        run(tmp_path, "other")


@pytest.mark.parametrize("what", ["silent exit", "deaf"])
def test_a_process_that_says_nothing_is_a_failure(tmp_path, what):
    with pytest.raises(AssertionError, match="its process failed"):
        run(tmp_path, what, payload=b"x" * 10_000_000)


def test_a_killed_process_is_probably_memory(tmp_path):
    def kill(*told: object) -> None:
        for child in children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(ResourceError, match=r"denoiser: .* killed \(SIGKILL\) .* running out of"):
        run(tmp_path, "sleep", watch=kill)
    assert not children()


@pytest.mark.parametrize("error", [KeyboardInterrupt, BackendError])
def test_whatever_stops_the_parent_kills_the_child_at_once(tmp_path, error):
    def stop(*told: object) -> None:
        assert len(children()) == 1
        raise error

    started = time.monotonic()
    with pytest.raises(error):
        run(tmp_path, "sleep", watch=stop)
    assert time.monotonic() - started < 30  # of the 60 that it would sleep
    assert not children()


def test_the_peak_is_at_least_what_the_child_said(tmp_path):
    """The system's own count cannot be lower: it starts from what this process held."""
    assert run(tmp_path, "memory").peak_bytes >= 10**15
