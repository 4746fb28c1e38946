"""Components that do not all fit into memory take turns."""

from __future__ import annotations

import numpy as np
import pytest

from gentron.bundle import Bundle
from gentron.engines.onnxruntime_cpu import OnnxRuntimeBackend
from gentron.errors import BackendError, ResourceError
from gentron.runtime import Pipeline
from gentron.runtime.residency import Residency, component_bytes

ASK = {"seed": 5, "steps": 2}


@pytest.fixture(scope="module")
def sizes(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    return {name: component_bytes(bundle, name, "fp32") for name in bundle.components}


def test_every_weight_of_a_bundle_is_some_components(tiny_bundle):
    from gentron.weights import stored_tensors

    bundle = Bundle.open(tiny_bundle)
    for folder in {c.folder for c in bundle.components.values()} - {"vae"}:
        stored = sum(np.prod(t.shape) for t in stored_tensors(bundle.path / folder).values())
        counted = sum(component_bytes(bundle, n, "fp32") / 4 / 1.3
                      for n, c in bundle.components.items() if c.folder == folder)  # fmt: skip
        assert counted == pytest.approx(stored, rel=1e-3)


def test_half_the_bits_are_half_the_memory(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    wide, narrow, brain = (component_bytes(bundle, "denoiser", p) for p in ("fp32", "fp16", "bf16"))
    assert wide == pytest.approx(2 * narrow, abs=2)
    assert narrow == brain


def test_a_picture_under_a_limit_is_the_picture_without(tiny_bundle, tiny_pipeline, sizes):
    limit = max(sizes.values()) + 1
    with Pipeline.load(tiny_bundle, memory=limit) as pipe:
        assert pipe._engines.resident == ()  # nothing before its turn
        limited = pipe("a cat", **ASK)
        assert pipe._engines.resident == ("vae_decoder",) or (
            sum(sizes[n] for n in pipe._engines.resident) <= limit
        )
        assert "text_encoder" not in pipe._engines.resident
        assert [info.component for info in limited.components] == list(sizes)
    assert np.array_equal(limited.images, tiny_pipeline("a cat", **ASK).images)


def test_no_more_than_the_limit_is_ever_loaded(tiny_bundle, sizes, monkeypatch):
    loaded: dict[str, int] = {}
    peak = [0]
    load = OnnxRuntimeBackend.load

    def counted(backend, graph, precision):
        name = graph.component.name
        engine = load(backend, graph, precision)
        loaded[name] = sizes[name]
        peak[0] = max(peak[0], sum(loaded.values()))
        close = engine.close
        engine.close = lambda: (loaded.pop(name, None), close())[1]
        return engine

    monkeypatch.setattr(OnnxRuntimeBackend, "load", counted)
    limit = int(max(sizes.values()) * 1.2)
    with Pipeline.load(tiny_bundle, memory=limit) as pipe:
        pipe("a cat", **ASK)
        pipe("a dog", **ASK)
    assert max(sizes.values()) <= peak[0] <= limit < sum(sizes.values())
    assert loaded == {}


def test_a_limit_below_the_largest_component_is_refused_with_the_number(tiny_bundle, sizes):
    largest = max(sizes, key=sizes.__getitem__)
    with pytest.raises(ResourceError, match=rf"memory: {largest} alone needs about .* the limit"):
        Pipeline.load(tiny_bundle, memory=sizes[largest] - 1)


def test_a_preview_that_does_not_fit_beside_the_loop_is_refused(tiny_bundle, sizes):
    with Pipeline.load(tiny_bundle, memory=max(sizes.values()) + 1) as pipe:
        generation = pipe.stream("a cat", **ASK)
        step = next(iter(generation))
        if sizes["denoiser"] + sizes["vae_decoder"] <= max(sizes.values()) + 1:
            pytest.skip("they fit")
        with pytest.raises(ResourceError, match="do without previews"):
            step.preview()


class Stub:
    def __init__(self, name, log):
        self.info, self._name, self._log = name, name, log

    def close(self):
        self._log.append(f"close {self._name}")


def residency(limit, sizes):
    log: list[str] = []

    def load(name):
        log.append(f"load {name}")
        return Stub(name, log)

    return Residency(load, list(sizes), sizes, limit), log


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_without_room_for_all_they_take_turns_and_the_largest_encoder_is_read_as_it_computes(
    tiny_bundle, sizes, monkeypatch, backend, caplog
):
    over = max((n for n in sizes if n.startswith("text_encoder")), key=sizes.__getitem__)
    with Pipeline.load(tiny_bundle, backend=backend) as pipe:
        expected = pipe("a cat", **ASK)
    monkeypatch.setattr(
        "gentron.runtime.residency.component_bytes",
        lambda bundle, name, precision: 5_000 if name == over else 1_000,
    )
    monkeypatch.setattr("gentron.runtime.residency.available_bytes", lambda: 5_000)
    with Pipeline.load(tiny_bundle, backend=backend) as pipe:
        assert pipe._engines.resident == ()
        found = pipe("a cat", **ASK)
        assert len(pipe._engines.resident) < len(sizes)
    by = {info.component: info.backend for info in found.components}
    assert by.pop(over) == "onnxruntime"
    assert set(by.values()) == {backend}
    assert f"{over} needs about 0.0 GB: it reads its weights anew" in caplog.text
    assert "each is loaded when its turn comes" in caplog.text
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1


def test_with_room_for_all_they_stay(tiny_bundle, sizes):
    with Pipeline.load(tiny_bundle) as pipe:
        assert set(pipe._engines.resident) == set(sizes)


def test_others_go_for_what_has_to_be_compiled_and_stay_for_what_has_not():
    closed = []

    class Loaded:
        def __init__(self, name):
            self.name, self.info = name, name

        def close(self):
            closed.append(self.name)

    engines = Residency(Loaded, "abc", dict.fromkeys("abc", 1), 3, {"c": 3})
    assert [engines[name].name for name in "ab"] == ["a", "b"]
    assert closed == []
    assert engines["c"].name == "c"
    assert closed == ["a", "b"]
    assert engines["a"].name == "a"
    assert closed == ["a", "b"]
    engines = Residency(Loaded, "abc", dict.fromkeys("abc", 1), 3, {"c": 3})
    with engines.pinned("a"):  # a generation uses it: then less room has to do
        assert [engines[name].name for name in "ac"] == ["a", "c"]


def test_what_was_used_longest_ago_goes_first():
    engines, log = residency(30, {"a": 10, "b": 10, "c": 10, "d": 10})
    for name in ("a", "b", "c", "a", "d"):
        engines[name]
    assert log == ["load a", "load b", "load c", "close b", "load d"]
    assert engines.resident == ("c", "a", "d")


def test_what_is_pinned_stays_and_only_until_it_is_not():
    engines, log = residency(20, {"a": 10, "b": 10, "c": 20})
    engines["a"]
    with engines.pinned("a"):
        engines["b"]
        with pytest.raises(ResourceError, match="c needs about"):
            engines["c"]
    engines["c"]
    assert log[-2:] == ["close a", "load c"]


def test_everything_is_closed_once_and_nothing_loads_afterwards():
    engines, log = residency(None, {"a": 1, "b": 1})
    engines.close()
    engines.close()
    assert sorted(log) == ["close a", "close b", "load a", "load b"]
    with pytest.raises(BackendError, match="closed"):
        engines["a"]


def test_a_component_that_cannot_be_loaded_closes_the_others():
    log: list[str] = []

    def load(name):
        if name == "b":
            raise BackendError("no b here")
        return Stub(name, log)

    with pytest.raises(BackendError, match="no b here"):
        Residency(load, ["a", "b"])
    assert log == ["close a"]
