"""Bundles exported with --only: they open, and what asks for the rest is told what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from gentron.bundle import MANIFEST, NULL_TEXT, Bundle, tokenizer_file
from gentron.contract import text_encoder_name
from gentron.engines import backend_named, bundle_graph
from gentron.errors import BundleError, RequestError
from gentron.runtime import Pipeline
from gentron.runtime.describe import bundle_facts

COMPONENTS = (
    *("text_encoder", "text_encoder_2", "text_projection", "conditioner", "denoiser"),
    "vae_decoder",
)
Only = Callable[..., Path]


@pytest.fixture
def only(tiny_copy: Path) -> Only:
    """The tiny bundle as an export of these components alone leaves it."""

    def cut(*names: str) -> Path:
        bundle = Bundle.open(tiny_copy, verify="sizes")
        assert tuple(bundle.components) == COMPONENTS
        values = json.loads((tiny_copy / MANIFEST).read_text("utf-8"))
        for table in ("precisions", "probes"):
            values[table] = {name: values[table][name] for name in names}
        kept = {"model_index.json", *values["probes"].values()}
        for name in names:
            component = bundle.components[name]
            kept |= {component.graph_file(p) for p in values["precisions"][name]}
            folder = tiny_copy / component.folder
            kept |= {f.relative_to(tiny_copy).as_posix() for f in folder.glob("*.safetensors")}
        kept.discard(NULL_TEXT)
        for i in range(2):
            if text_encoder_name(i) in names:
                kept |= {str(tokenizer_file(i)), NULL_TEXT}
        for name in list(values["files"]):
            if name not in kept and not name.endswith("config.json"):
                del values["files"][name]
                (tiny_copy / name).unlink()
        (tiny_copy / MANIFEST).write_text(json.dumps(values), "utf-8")
        return tiny_copy

    return cut


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if anything is loaded into an engine."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("an engine"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / MANIFEST).read_text("utf-8"))
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values), "utf-8")


def test_a_whole_bundle_misses_nothing(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.missing == ()
    bundle.check_complete()


@pytest.mark.parametrize("name", COMPONENTS)
def test_an_export_of_one_component_opens_and_says_what_else_there_is_not(
    only: Only, name: str
) -> None:
    bundle = Bundle.open(only(name))
    assert bundle.missing == tuple(other for other in COMPONENTS if other != name)
    assert set(bundle.components) == set(COMPONENTS)  # what it would be as a whole
    for precision in ("fp16", "fp32"):
        assert bundle.graph(name, precision).is_file()
    for other in bundle.missing:
        with pytest.raises(BundleError, match=f"has no {other}, .*; export again without --only"):
            bundle.graph(other, "fp16")


def test_what_was_exported_alone_loads_into_an_engine(only: Only) -> None:
    """All of its weights are there."""
    bundle = Bundle.open(only("denoiser"))
    backend = backend_named("onnxruntime")
    engine = backend.load(bundle_graph(bundle, "denoiser", "fp32"), "fp32")
    engine.close()
    backend.close()


@pytest.mark.parametrize("names", [(), ("denoiser",), COMPONENTS[:2], COMPONENTS[:-1]])
def test_a_pipeline_names_all_that_is_missing_before_it_loads_anything(
    only: Only, no_engines: None, names: tuple[str, ...]
) -> None:
    folder = only(*names)
    absent = ", ".join(name for name in COMPONENTS if name not in names)
    with pytest.raises(BundleError) as caught:
        Pipeline.load(folder)
    expected = f"{folder}: exported with --only, without {absent}; export again without --only"
    assert str(caught.value) == expected


def test_a_component_without_a_precision_is_missing(only: Only) -> None:
    folder = only("denoiser", "conditioner")
    edit(folder, lambda values: values["precisions"].update(denoiser=[]))
    bundle = Bundle.open(folder)
    assert "denoiser" in bundle.missing
    with pytest.raises(BundleError, match=r"has no denoiser, .*; export again without --only"):
        bundle.graph("denoiser", "fp16")


def test_a_precision_that_was_not_exported_is_still_told_apart(only: Only) -> None:
    with pytest.raises(BundleError, match=r"denoiser has no bf16 graph, only fp16, fp32; .*--bf16"):
        Bundle.open(only("denoiser")).graph("denoiser", "bf16")


@pytest.mark.parametrize("name", ["decoder", "", "text_encoder_3"])
def test_a_component_that_the_model_has_not_is_refused(tiny_bundle: Path, name: str) -> None:
    with pytest.raises(RequestError, match=f"component: must be one of .*denoiser.* got '{name}'"):
        Bundle.open(tiny_bundle).graph(name, "fp16")


def test_a_manifest_with_graphs_of_an_unknown_component_is_refused(tiny_copy: Path) -> None:
    edit(tiny_copy, lambda values: values["precisions"].update(upscaler=["fp16"]))
    with pytest.raises(
        BundleError, match=r"gentron\.json: .* unknown component 'upscaler'; export"
    ):
        Bundle.open(tiny_copy)


@pytest.mark.parametrize(
    ("component", "needed"),
    [
        ("text_encoder", "tokenizer/tokenizer.json"),
        ("text_encoder_2", "tokenizer_2/tokenizer.json"),
        ("text_encoder", NULL_TEXT),
        ("text_encoder_2", NULL_TEXT),
        ("vae_decoder", "vae/decoder.fp16.onnx"),
        ("vae_decoder", "transformer/config.json"),
        ("denoiser", "vae/config.json"),
    ],
)
def test_what_a_component_needs_must_have_a_digest(only: Only, component: str, needed: str) -> None:
    folder = only(component)
    edit(folder, lambda values: values["files"].pop(needed))
    with pytest.raises(BundleError, match=f"{needed}: the manifest has no digest of it; export"):
        Bundle.open(folder)


def test_its_facts_say_which_components_it_has(only: Only) -> None:
    facts = bundle_facts(Bundle.open(only("denoiser", "vae_decoder")))
    absent = "not in it: exported with --only"
    assert facts["components"] == dict.fromkeys(COMPONENTS, absent) | dict.fromkeys(
        ("denoiser", "vae_decoder"), "fp16, fp32"
    )
