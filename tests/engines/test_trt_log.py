"""TensorRT's calls fail without raising; its log says why."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref

import pytest

from gentron.engines.trt_log import KEPT, Messages, failure, logger_for, require
from gentron.errors import BackendError

ERROR, WARNING, INFO = 1, 2, 3
NO_KERNEL = (
    "Error Code 10: Could not find any implementation for node {ForeignNode[onnx::MatMul_1...]} "
    "due to insufficient workspace. See verbose log for requested sizes."
)


def messages(*errors: str) -> Messages:
    made = Messages()
    for text in errors:
        made.add(ERROR, text)
    return made


@pytest.mark.parametrize("value", [None, False, -1])
def test_what_tensorrt_returns_for_a_failure_becomes_an_error(value):
    with pytest.raises(BackendError, match="denoiser: the build failed: out of luck"):
        require(value, "the build", messages("out of luck"), "denoiser")


@pytest.mark.parametrize("value", [0, 1, True, "", object()])
def test_anything_else_is_handed_through_the_first_profile_included(value):
    assert require(value, "the build", Messages(), "denoiser") is value


def test_an_error_is_one_line_with_the_layer_and_the_last_errors_only():
    said = [f"error {i}\n  in layer block_{i}.attention: bad" for i in range(30)]
    text = str(failure(messages(*said), "denoiser", "the build"))
    assert "\n" not in text
    assert text.count("bad") == 3
    assert "error 29" in text
    assert "error 26" not in text
    assert "failed at block_" in text


@pytest.mark.parametrize(
    ("line", "layer"),
    [
        (NO_KERNEL, "{ForeignNode[onnx::MatMul_1...]}"),
        ("Could not find any implementation for node conv_1.", "conv_1"),
        ("Cannot compile operation 'node_MatMul_566' for Turing (SM75)", "node_MatMul_566"),
        ("Dimension mismatch (layer node_add_3: sizes 4 and 5)", "node_add_3"),
        ("Nothing is named here", ""),
    ],
)
def test_the_layer_is_found_in_the_words_of_the_library(line, layer):
    assert messages(line).layer() == layer


def test_a_missing_kernel_says_profile_workspace_and_what_to_change():
    error = failure(
        messages(NO_KERNEL), "vae_decoder", "the build", profiles="K=1,h=64", workspace=2 * 10**9
    )
    for part in ("vae_decoder", "ForeignNode", "K=1,h=64", "2.0 GB", "GENTRON_WORKSPACE_BYTES",
                 "narrow the profile", "insufficient workspace"):  # fmt: skip
        assert part in str(error)


def test_the_missing_driver_is_not_given_as_the_reason_when_there_is_another():
    driver = "Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"
    assert messages("a real reason", driver).last_errors() == ["a real reason"]
    assert messages(driver).last_errors() == [driver]


def test_messages_are_kept_by_kind_and_bounded():
    kept = Messages()
    for index in range(3 * KEPT):
        kept.add(WARNING, f"warning {index}")
    kept.add(WARNING, f"warning {3 * KEPT - 1}")
    kept.add(ERROR, "wrong")
    kept.add(INFO, "told")
    assert len(kept.warnings) == KEPT
    assert kept.warnings[-1] != kept.warnings[-2]
    assert list(kept.errors) == ["wrong"]


def test_one_logger_sorts_by_severity_tells_all_who_listen_and_is_quiet_itself(caplog):
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    first, second = Messages(), Messages()
    logger = logger_for(trt, first)
    assert logger_for(trt, second) is logger
    with caplog.at_level(logging.DEBUG, logger="gentron.engines.trt_log"):
        logger.log(trt.ILogger.INTERNAL_ERROR, "broken")
        logger.log(trt.ILogger.ERROR, "wrong")
        logger.log(trt.ILogger.WARNING, "odd")
        logger.log(trt.ILogger.VERBOSE, "detail\nin two lines")
    for kept in (first, second):
        assert (list(kept.errors), list(kept.warnings)) == (["broken", "wrong"], ["odd"])
    levels = [(record.getMessage(), record.levelname) for record in caplog.records]
    assert levels == [("broken", "INFO"), ("wrong", "INFO"), ("odd", "INFO"),
                      ("detail in two lines", "DEBUG")]  # fmt: skip


def test_a_logger_keeps_nobody_alive_who_listened():
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    messages = Messages()
    listens = weakref.ref(messages)
    logger_for(trt, messages)
    del messages
    gc.collect()
    assert listens() is None


GARBAGE = """
import gc, sys
import tensorrt_rtx_bindings as trt
from gentron.engines import trt_log

tell = trt_log._Audience.tell
def tell_and_collect(*message):
    tell(*message)
    gc.collect()
trt_log._Audience.tell = tell_and_collect

gc.disable()
for _ in range(3):
    cycle = [trt.Builder(trt_log.logger_for(trt, trt_log.Messages()))]
    cycle.append(cycle)
    del cycle
print(gc.collect() > 0)
"""
THREADS = """
import threading, time
import tensorrt_rtx_bindings as trt
from gentron.engines import trt_log

tell = trt_log._Audience.tell
def tell_and_give_way(*message):
    tell(*message)
    time.sleep(0.002)
trt_log._Audience.tell = tell_and_give_way

made, ends = [0, 0, 0], time.monotonic() + 2
def work(number):
    while time.monotonic() < ends:
        builder = trt.Builder(trt_log.logger_for(trt, trt_log.Messages()))
        time.sleep(0.001)
        del builder
        made[number] += 1

threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(min(made) > 0)
"""


@pytest.mark.parametrize("script", [GARBAGE, THREADS], ids=["garbage", "threads"])
def test_a_builder_that_ends_while_another_begins_stops_nothing(script):
    """In a process of its own: where it fails, it waits for ever, and holds the interpreter."""
    pytest.importorskip("tensorrt_rtx_bindings")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.stdout == "True\n", done.stderr
