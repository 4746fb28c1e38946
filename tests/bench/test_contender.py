"""Processes that are measured in turn, and what becomes of those that fail."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from gentron.bench.contender import Contender, in_turns
from gentron.bench.rounds import _differences
from gentron.bench.work import request_of, stage_work
from gentron.bundle import Bundle
from gentron.errors import BackendError, RequestError, ResourceError

COUNTING = """
import sys
from gentron.bench.runner import Runner
from gentron.bench.worker import serve
class Counting(Runner):
    facts = {"label": "counts", "precision": "fp32", "device": "cpu"}
    count = 0
    def run(self):
        self.count += 1
        print("noise of a library", self.count)
        return self.count / 100
sys.exit(serve(lambda line: Counting()))
"""


@pytest.fixture
def contender(tmp_path):
    return lambda code: Contender("odd", [sys.executable, "-c", code], "{}", tmp_path / "log")


class Turn:
    """Notes when it was asked."""

    def __init__(self, name, order):
        self.name, self.order = name, order

    def measure(self, seconds):
        self.order.append(self.name)


def test_everyone_runs_in_every_round_and_the_first_changes():
    order = []
    in_turns([Turn(name, order) for name in "abc"], rounds=3, seconds=0)
    assert order == list("abcbcacab")


def test_answers_are_times_whatever_libraries_print(contender):
    with contender(COUNTING) as counting:
        counting.measure(0)
        (times,) = counting.rounds
        assert times[0] > 0
        assert counting.facts["label"] == "counts"
        assert counting.peak_bytes is not None


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "killed .SIGKILL.*out of memory"),
        ("raise RuntimeError('no such kernel')", BackendError, "ended with 1: .*no such kernel"),
        (
            "from gentron.bench.worker import serve\n"
            "from gentron.errors import RequestError\n"
            "def make(line):\n    raise RequestError('size', 'odd')\n"
            "serve(make)",
            RequestError,
            "size: odd",
        ),
    ],
)
def test_one_that_ends_says_why(contender, code, error, message):
    with pytest.raises(error, match=message), contender(code):
        pass


class Stored:
    """A contender whose outputs are given."""

    facts = {"precision": "fp32"}  # noqa: RUF012

    def __init__(self, name, outputs):
        self.name, self._outputs = name, outputs

    def outputs(self, file):
        np.savez(file, **self._outputs)
        return file


def test_one_that_computes_something_else_gives_no_figures(tiny_bundle, tmp_path):
    bundle = Bundle.open(tiny_bundle)
    work = stage_work(bundle, "decode", request_of(bundle))
    right = {"0.pixels": np.linspace(-1, 1, 768, dtype=np.float32).reshape(1, 3, 16, 16)}
    near = {"0.pixels": right["0.pixels"] + np.float32(1e-6)}
    wrong = {"0.pixels": right["0.pixels"] + np.float32(1e-2)}
    first = Stored("ours", right)
    close = _differences(bundle, work, [first, Stored("near", near), Stored("none", {})], tmp_path)
    assert close == {"near": pytest.approx(1e-6, rel=0.1)}
    with pytest.raises(BackendError, match=r"wrong: its pixels of vae_decoder is off by 1.0e-02"):
        _differences(bundle, work, [first, Stored("wrong", wrong)], tmp_path)


def test_the_payload_is_json(tiny_bundle, tmp_path):
    bundle = Bundle.open(tiny_bundle)
    work = stage_work(bundle, "step", request_of(bundle))
    made = Contender.of("onnxruntime", work, 1, tmp_path / "log")
    assert json.loads(made.payload)["stage"] == "step"
