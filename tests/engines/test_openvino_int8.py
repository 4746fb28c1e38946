"""Weights of 8 bits: smaller, close enough, refused where they are not, and never by default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("openvino", reason="not installed; pip install '.[dev]'")
pytest.importorskip("nncf", reason="not installed; pip install '.[dev]'")

from gentron.agreement import TOLERANCES
from gentron.bundle import Bundle, locate
from gentron.engines import EngineOptions, backend_named, bundle_graph
from gentron.engines.cache import EngineCache
from gentron.engines.probe_check import check_component
from gentron.errors import BackendError


@pytest.fixture(scope="module")
def emoji() -> Bundle:
    return Bundle.open(locate("emoji"))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("int8") / "engines")


@pytest.fixture(scope="module")
def backend(store):
    with backend_named("openvino", EngineOptions(store=store)) as made:
        yield made


def sizes(store: EngineCache, precision: str) -> list[int]:
    return [e.size for e in store.entries() if e.key.precision == precision]


def test_the_packaged_denoiser_loses_little_and_takes_half_the_room(emoji, backend, store):
    check = check_component(emoji, backend, "denoiser", "int8")
    assert check.result == "pass", check
    assert check.computed == "int8"
    worst = max(agreement.max_relative for agreement in check.agreements)
    assert 1e-4 < worst < TOLERANCES["int8"].max_relative / 1.5  # rounded, and not too much
    plain = check_component(emoji, backend, "denoiser", "fp32")
    assert plain.result == "pass"
    assert max(sizes(store, "int8")) < 0.6 * min(sizes(store, "fp32"))


def test_other_components_keep_their_weights(emoji, backend):
    engine = backend.load(bundle_graph(emoji, "conditioner", "fp32"), "int8")
    assert engine.info.precision == "float32"
    engine.close()


def test_a_loss_above_the_bound_is_refused_in_any_shape(emoji, backend, monkeypatch):
    """Also in one that no golden probe has: here the picture's own, without guidance."""
    tight = replace(TOLERANCES["int8"], max_relative=1e-4)
    monkeypatch.setitem(TOLERANCES, "int8", tight)
    engine = backend.load(bundle_graph(emoji, "denoiser", "fp32"), "int8")
    own = {"B": 3, "R": 3, "F": 1, "T": 1, "U": 1, "h": 16, "w": 16}
    with pytest.raises(BackendError, match=r"weights of 8 bits cost denoiser too much: .*--int8"):
        engine._model_for(own)


def test_nobody_gets_8_bits_who_did_not_ask(backend):
    assert "int8" not in backend.precisions
    assert backend.graph_precision("int8") == "fp32"
    with pytest.raises(BackendError, match="does not compute in int8"):
        backend_named("onnxruntime").graph_precision("int8")


def test_an_absent_nncf_says_what_to_install(emoji, backend, monkeypatch, tiny_bundle: Path):
    import importlib.metadata

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    engine = backend.load(bundle_graph(Bundle.open(tiny_bundle), "denoiser", "fp32"), "int8")
    with pytest.raises(BackendError, match=r"pip install 'gentron\[int8\]'"):
        engine._model_for({"B": 1, "R": 1, "F": 1, "T": 1, "U": 1, "h": 8, "w": 8})
