"""The paper's tables 1 and 2 as configurations, and configurations as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from gentron.config import GenTronConfig, ModelSpec, TextConfig
from gentron.errors import BundleError, RequestError
from gentron.model import GenTron
from gentron.presets import PRESETS, preset

PAPER = {"xl2": 930.0, "g2": 3083.8}  # table 1, millions of parameters
TEXT = TextConfig("t5", width=32, max_tokens=8)
SMALL = GenTronConfig(width=64, depth=3, mlp_width=128, heads=4, text=(TEXT,))

every_preset = pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS.keys())


@cache
def parameters(name: str) -> float:
    """Millions of parameters of the transformer, built without memory for them."""
    with torch.device("meta"):
        model = GenTron(preset(name).transformer)
    return sum(p.numel() for p in model.parameters()) / 1e6


# --- tables 1 and 2 ---


@pytest.mark.parametrize(
    ("name", "depth", "width", "mlp_width"), [("xl2", 28, 1152, 4608), ("g2", 48, 1664, 6656)]
)
def test_the_shapes_are_those_of_table_1(name: str, depth: int, width: int, mlp_width: int) -> None:
    for config in (preset(name).transformer, preset(f"{name}-video").transformer):
        assert (config.depth, config.width, config.mlp_width) == (depth, width, mlp_width)
        assert config.patch == 2
        assert config.heads == 16  # not in the paper: DiT-XL's


def test_the_larger_model_has_as_many_more_parameters_as_in_the_paper() -> None:
    """3083.8 M - 930.0 M: so widths, per-block adaLN and text widths are the paper's."""
    assert round(parameters("g2") - parameters("xl2"), 1) == 2153.8
    assert round(PAPER["g2"] - PAPER["xl2"], 1) == 2153.8


@pytest.mark.parametrize("name", ["xl2", "g2"])
def test_a_remainder_of_22_8_million_does_not_depend_on_the_scale(name: str) -> None:
    """The paper does not say what it is; being the same at both widths, it is no block's."""
    assert round(PAPER[name] - parameters(name), 1) == 22.8


@pytest.mark.parametrize(("name", "added"), [("xl2", 148.8), ("g2", 531.9)])
def test_temporal_attention_adds_four_projections_a_block(name: str, added: float) -> None:
    config = preset(name).transformer
    layer = 4 * (config.width**2 + config.width)
    more = parameters(f"{name}-video") - parameters(name)
    assert more == pytest.approx(config.depth * layer / 1e6, abs=1e-9)
    assert round(more, 1) == added


@pytest.mark.parametrize("prefix", ["xl2", "tiny"])
def test_the_variants_of_table_2_differ_in_their_text_alone(prefix: str) -> None:
    base = preset(prefix)
    clip, t5 = base.transformer.text
    variants: dict[str, tuple[tuple[TextConfig, ...], str]] = {
        "clip-adaln": ((clip,), "adaln"),
        "clip": ((clip,), "cross_attention"),
        "t5": ((replace(t5, gives_pooled=True),), "cross_attention"),
    }
    for name, (text, injection) in variants.items():
        spec = preset(f"{prefix}-{name}")
        expected = replace(base.transformer, text=text, injection=injection)
        assert spec.transformer == expected
        assert [e["model_type"] for e in spec.encoders] == [
            {"clip": "clip_text_model", "t5": "t5"}[t.family] for t in text
        ]
        assert (spec.vae, spec.scheduler) == (base.vae, base.scheduler)
    assert [t.family for t in base.transformer.text] == ["clip", "t5"]


@every_preset
def test_a_preset_agrees_with_its_own_parts(spec: ModelSpec) -> None:
    assert preset(spec.name) is spec
    config = spec.transformer
    assert config.sample_frames <= config.max_frames
    assert config.temporal == (config.max_frames > 1)
    if spec.encoders:  # emoji's come with its weights
        assert len(spec.encoders) == len(config.text)
        assert spec.vae["latent_channels"] == config.latent_channels
        for text, encoder in zip(config.text, spec.encoders, strict=True):
            assert text.width == encoder.get("hidden_size", encoder.get("d_model"))
            assert text.max_tokens <= encoder.get("max_position_embeddings", text.max_tokens)


def test_an_unknown_preset_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(RequestError, match=r"unknown preset 'xl3'; one of xl2, g2, .*emoji"):
        preset("xl3")


# --- configurations ---


@every_preset
def test_a_configuration_is_the_same_after_json(spec: ModelSpec) -> None:
    stored = json.loads(json.dumps(spec.transformer.to_dict()))
    assert GenTronConfig.from_dict(stored) == spec.transformer


def test_reading_a_configuration_leaves_the_given_values_alone() -> None:
    values = SMALL.to_dict()
    before = json.dumps(values)
    GenTronConfig.from_dict(values)
    assert json.dumps(values) == before


def test_blocks_read_the_encoders_in_turn() -> None:
    two = replace(SMALL, depth=5, text=(TEXT, TEXT))
    assert [list(two.text_blocks(i)) for i in range(2)] == [[0, 2, 4], [1, 3]]
    assert list(replace(SMALL, depth=5).text_blocks(0)) == [0, 1, 2, 3, 4]
    pooled = replace(TEXT, gives_pooled=True)
    assert list(replace(SMALL, injection="adaln", text=(pooled,)).text_blocks(0)) == []


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"width": 0}, "width must be at least 1, got 0"),
    ({"depth": -1}, "depth must be at least 1, got -1"),
    ({"heads": 0}, "heads must be at least 1"),
    ({"patch": 0}, "patch must be at least 1"),
    ({"latent_channels": 0}, "latent_channels must be at least 1"),
    ({"width": 72}, r"width 72 must be a multiple of 4 x heads \(4\)"),
    ({"text": ()}, "one or two text encoders, got 0"),
    ({"text": (TEXT,) * 3}, "one or two text encoders, got 3"),
    ({"text": (replace(TEXT, gives_pooled=True),) * 2}, "at most one text encoder may give"),
    ({"injection": "adaln"}, "'adaln' needs an encoder that gives pooled text"),
    ({"injection": "adain"}, "injection"),
    ({"depth": 1, "text": (TEXT, TEXT)}, "depth"),  # the second encoder would have no block
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_configuration_that_cannot_be_built_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        replace(SMALL, **changes)


def stored(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(SMALL.to_dict()))
    change(values)
    return values


DAMAGED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda v: v.update(hats=3), "'hats'.*newer version"),
    (lambda v: v["text"][0].update(hats=3), "'hats'.*newer version"),
    (lambda v: v.pop("width"), "'width'"),
    (lambda v: v["text"][0].pop("family"), "'family'"),
    (lambda v: v.pop("text"), "one or two text encoders, got 0"),
    (lambda v: v.update(text=5), "transformer config"),
    (lambda v: v.update(text=["t5"]), "transformer config"),
    (lambda v: v.update(width="64"), "width|transformer config"),
    (lambda v: v.update(depth=None), "depth|transformer config"),
    (lambda v: v.update(depth=3.5), "depth|transformer config"),
    (lambda v: v.update(side_range=5), "side_range|transformer config"),
    (lambda v: v.update(side_range=[64]), "side_range|transformer config"),
    (lambda v: v["text"][0].update(max_tokens="8"), "max_tokens|transformer config"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_damaged_configuration_file_is_refused_by_the_name_of_its_field(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        GenTronConfig.from_dict(stored(change))
