"""Peers: what they need, what they get, and what the machine could do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gentron.bench import peers
from gentron.bench.flops import _from_shapes, stage_flops
from gentron.bench.machine import machine_facts, physical_cores
from gentron.bench.work import request_of, stage_work
from gentron.bundle import Bundle
from gentron.errors import RequestError


def test_a_missing_peer_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"torch-compile needs torch, .*'gentron\[export\]'"):
        peers.check_peers(("torch-compile",))


def test_an_unknown_peer_lists_the_known():
    with pytest.raises(RequestError, match="unknown peer 'jax'; one of torch, torch-compile"):
        peers.check_peers(("jax",))


def test_peers_get_the_allocator_that_is_there_and_ours_do_not(monkeypatch, tmp_path):
    library = tmp_path / peers.TCMALLOC[0]
    library.touch()
    monkeypatch.setattr(peers, "LIBRARY_FOLDERS", (str(tmp_path),))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert peers.environment("torch", 2)["LD_PRELOAD"] == str(library)
    assert peers.environment("torch", 2)["OMP_NUM_THREADS"] == "2"
    assert "LD_PRELOAD" not in peers.environment("openvino", 2)


@pytest.mark.parametrize("stage", ["condition", "step"])
def test_operations_in_the_graphs_are_those_of_their_shapes(tiny_bundle, stage):
    bundle = Bundle.open(tiny_bundle)
    work = stage_work(bundle, stage, request_of(bundle, size=(32, 16)))
    counted, how = stage_flops(work)
    assert how == "in the graphs"
    assert counted == pytest.approx(sum(_from_shapes(bundle, c) for c in work.calls), rel=0.02)


def test_a_decoder_is_counted_in_its_graph_alone(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    small, large = (
        stage_flops(stage_work(bundle, "decode", request_of(bundle, size=(side, 32))))[0]
        for side in (32, 64)
    )
    assert 2 <= large / small < 2.5  # convolutions double, the attention in the middle quadruples


def test_the_machine_is_described():
    facts = machine_facts()
    assert 1 <= physical_cores() == facts["cores"]
    assert facts["cpu"]
    if Path("/proc/meminfo").exists():
        assert facts["memory_bytes"] > 1e8
