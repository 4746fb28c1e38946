"""The scorer knows real renderings, and gives nothing away to noise."""

from __future__ import annotations

import pytest
import torch

from gentron.errors import RequestError
from gentron.train.scenes import find_font, load_sprites, nouns
from gentron.train.score import TemplateScorer, noise, renderings, tile


@pytest.fixture(scope="module")
def sprites() -> torch.Tensor:
    try:
        return load_sprites(find_font(), nouns())
    except RequestError:
        pytest.skip("needs NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji)")


def test_real_renderings_at_new_sizes_and_places_are_recognised(sprites):
    scorer = TemplateScorer(sprites, nouns())
    assert scorer.score(renderings(sprites, nouns(), 1)).first > 0.95


def test_noise_is_recognised_no_better_than_by_chance(sprites):
    assert TemplateScorer(sprites, nouns()).score(noise(1)).first < 0.02


def test_another_noun_ranks_behind(sprites):
    scorer = TemplateScorer(sprites, nouns())
    verdict = scorer.judge(renderings(sprites, nouns(), 1)("cat"), "newspaper")
    assert verdict.rank > 0
    assert verdict.choice == "cat"


def test_an_empty_picture_is_a_white_tile():
    assert (tile(torch.ones(3, 64, 64)) == 1).all()
