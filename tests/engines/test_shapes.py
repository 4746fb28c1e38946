"""Declarations of shapes: what people write, what each component's axes make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gentron.contract import contract
from gentron.engines.shapes import (
    AxisRange,
    contains,
    default_declaration,
    parse_declaration,
    tensor_shapes,
)
from gentron.errors import RequestError
from gentron.presets import PRESETS
from gentron.probe import probe_sizes

FACTOR = 8
CONFIG = PRESETS["g2"].transformer
VIDEO = PRESETS["g2-video"].transformer
DEFAULT = default_declaration(CONFIG, FACTOR)
COMPONENTS = contract(CONFIG, FACTOR)


def parse(text, config=CONFIG):
    return parse_declaration(text, default_declaration(config, FACTOR), config, FACTOR)


def test_nothing_declared_is_the_native_size_and_any_guidance_of_four_samples():
    assert DEFAULT.width == DEFAULT.height == AxisRange.fixed(512)
    assert (DEFAULT.samples.most, DEFAULT.rows.most) == (4, 12)
    assert parse("") == DEFAULT


def test_the_native_probe_lies_within_the_defaults():
    for config in (CONFIG, VIDEO):
        declared = default_declaration(config, FACTOR)
        for component in contract(config, FACTOR).values():
            usual = probe_sizes(component, config)[0]
            profile = declared.profile(component, FACTOR)
            native = {axis: profile[axis].usual for axis in "hw" if axis in profile}
            assert contains(profile, usual | native), (component.name, usual)


def test_pixels_become_latents_and_only_the_axes_of_a_component_count():
    declared = parse("size=256x512,samples=2,rows=4,frames=1")
    denoiser = declared.profile(COMPONENTS["denoiser"], FACTOR)
    assert (denoiser["w"], denoiser["h"]) == (AxisRange.fixed(32), AxisRange.fixed(64))
    decoder = declared.profile(COMPONENTS["vae_decoder"], FACTOR)
    assert set(decoder) == {"K", "h", "w"}


def test_other_row_counts_leave_every_other_component_as_it_is():
    for name, component in COMPONENTS.items():
        before, after = (parse(t).profile(component, FACTOR) for t in ("", "rows=1:2:3,samples=1"))
        assert (before == after) == (name != "denoiser")


def test_shapes_of_tensors_follow_the_contract():
    profile = parse("samples=1:2:3,rows=2:4:9,size=64x64:128x128:256x256").profile(
        COMPONENTS["denoiser"], FACTOR
    )
    shapes = tensor_shapes(COMPONENTS["denoiser"], profile)
    assert shapes["state"] == ((1, 3, 1, 4, 8, 8), (2, 3, 1, 4, 16, 16), (3, 3, 1, 4, 32, 32))
    assert shapes["row_sample"] == ((2,), (4,), (9,))
    assert list(shapes) == [spec.name for spec in COMPONENTS["denoiser"].inputs]


def test_more_samples_bring_their_rows_along():
    assert parse("samples=1:8:16").rows == AxisRange(1, 16, 48)
    assert parse("samples=1:8:16", VIDEO).rows == AxisRange(1, 24, 48)
    assert parse("samples=1:8:16,rows=16").rows == AxisRange.fixed(16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows=4:2:8", r"LEAST:USUAL:MOST with 1 <= LEAST <= USUAL <= MOST, got 4:2:8"),
        ("samples=0", "1 <= LEAST"),
        ("samples=1:2", r"'samples=1:2': give one number, or LEAST:USUAL:MOST"),
        ("samples=two", "'two' is not a whole number"),
        ("samples=-1", "'-1' is not a whole number"),
        ("samples", "'' is not a whole number"),
        ("size=500x512", "500x512 does not work: each side must be a multiple of 16 from 64 to "),
        ("size=512x512:512x512:4096x4096", "4096x4096 does not work"),
        ("samples=1,samples=2", "samples is given twice"),
        ("table=1:999999999:999999999", "table must be at most 65536"),
        ("size=512", "'512' is not WIDTHxHEIGHT"),
        ("size=512x512:256x256:1024x1024", "LEAST <= USUAL"),
        ("frames=2", "at most 1, got 2"),
        ("speed=9", "unknown name 'speed'; write for example samples="),
        ("width=512", "unknown name 'width'"),
        ("samples=4,rows=1:2:2", "every sample needs one, got 1:2:2 for 4 samples"),
        ("samples=1,rows=4", "1 samples never have 4"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(text, message):
    with pytest.raises(RequestError, match=message) as refused:
        parse(text)
    assert str(refused.value).startswith("profile: ")


ranges = st.lists(st.integers(1, 64), min_size=3, max_size=3).map(
    lambda numbers: AxisRange(*sorted(numbers))
)


@given(samples=ranges, table=ranges, texts=ranges, decode=ranges, width=ranges, height=ranges)
def test_a_declaration_reads_back_as_it_prints(samples, table, texts, decode, width, height):
    unit = CONFIG.patch * FACTOR
    width, height = (  # from 64 pixels on
        AxisRange(*((side + 3) * unit for side in (r.least, r.usual, r.most)))
        for r in (width, height)
    )
    rows = AxisRange(1, samples.usual, samples.most)
    declared = replace(DEFAULT, samples=samples, rows=rows, table=table, texts=texts,
                       decode=decode, width=width, height=height)  # fmt: skip
    assert parse(str(declared)) == declared
