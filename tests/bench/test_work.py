"""What is measured: the calls of a stage, and that every contender can make their inputs again."""

from __future__ import annotations

import pytest

from gentron.bench.work import STAGES, Work, profile_of, request_of, stage_work
from gentron.bundle import Bundle
from gentron.engines.graphs import declarations
from gentron.engines.shapes import contains
from gentron.errors import RequestError


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


def test_a_guided_step_has_two_rows_a_sample_and_the_size_that_was_asked(bundle):
    request = request_of(bundle, size=(32, 16), batch=3)
    sizes = stage_work(bundle, "step", request).sizes
    assert (sizes["B"], sizes["R"], sizes["w"], sizes["h"]) == (3, 6, 16, 8)
    assert sizes["T"] == 2 * bundle.manifest.defaults.steps  # two texts, every step


def test_without_guidance_a_sample_is_one_row(bundle):
    work = stage_work(bundle, "step", request_of(bundle, guidance=1.0))
    assert (work.sizes["R"], work.sizes["U"]) == (1, 1)


def test_every_component_belongs_to_one_stage(bundle):
    works = [stage_work(bundle, stage, request_of(bundle)) for stage in STAGES]
    named = [call.component for work in works for call in work.calls]
    assert sorted(named) == sorted(bundle.components)


def test_work_survives_the_way_to_another_process(bundle):
    for stage in STAGES:
        work = stage_work(bundle, stage, request_of(bundle), threads=2).in_precision("bf16")
        assert Work.from_json(work.to_json()) == work


@pytest.mark.parametrize("stage", STAGES)
def test_engines_are_compiled_for_the_shapes_of_the_work(bundle, stage):
    work = stage_work(bundle, stage, request_of(bundle, size=(32, 32), batch=2))
    (declared,) = declarations(bundle, [profile_of(work, bundle)])
    for call in work.calls:
        profile = declared.profile(bundle.components[call.component], bundle.vae_factor)
        assert contains(profile, call.case.sizes)


def test_what_a_model_does_not_take_is_refused(bundle):
    with pytest.raises(RequestError, match="try 16x16"):
        stage_work(bundle, "step", request_of(bundle, size=(17, 16)))
    with pytest.raises(RequestError, match="frames: must be 1 to 1"):
        request_of(bundle, frames=2)
    with pytest.raises(RequestError, match="unknown stage 'dream'; one of encode"):
        stage_work(bundle, "dream", request_of(bundle))
