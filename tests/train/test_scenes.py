"""Training pictures: the caption says what is drawn, and what is held out stays out."""

from __future__ import annotations

from collections import Counter

import emoji
import pytest
import torch

from gentron.errors import RequestError
from gentron.train import scenes
from gentron.train.scenes import (
    COLORS,
    PLACES,
    Placement,
    Scene,
    SceneSampler,
    article,
    draw,
    find_font,
    held_out_color,
    load_sprites,
    nouns,
)


@pytest.fixture(scope="module")
def sampled() -> list[Scene]:
    return SceneSampler(nouns(), 0).sample(4000)


@pytest.fixture(scope="module")
def square() -> torch.Tensor:
    """One opaque red sprite with a margin of an eighth."""
    sprite = torch.zeros(1, 4, 128, 128)
    sprite[:, 0, 16:112, 16:112] = 1
    sprite[:, 3, 16:112, 16:112] = 1
    return sprite


def test_every_noun_is_an_english_name_of_the_emoji_package():
    names = {data["en"].strip(":").replace("_", " ").lower() for data in emoji.EMOJI_DATA.values()}
    assert set(nouns()) <= names
    assert len(nouns()) == len(set(nouns())) > 350


def test_every_noun_has_a_picture_of_its_own():
    try:
        font = find_font()
    except RequestError:
        pytest.skip("needs NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji)")
    sprites = load_sprites(font, nouns())
    assert sprites.shape == (len(nouns()), 4, 128, 128)
    assert (sprites[:, 3].flatten(1).mean(1) > 0.03).all()
    assert (sprites[:, :3] <= sprites[:, 3:] + 0.1).all()  # premultiplied; Lanczos rings a little
    assert len({sprite.numpy().tobytes() for sprite in sprites}) == len(nouns())


def test_captions_name_the_objects_and_the_background(sampled):
    names = nouns()
    for scene in sampled:
        for placement in scene.placements:
            assert names[placement.noun] in scene.caption
        if scene.background != "white":
            assert scene.background in scene.caption


def test_a_noun_never_stands_on_the_background_held_out_for_it(sampled):
    for scene in sampled:
        for placement in scene.placements:
            assert held_out_color(nouns()[placement.noun]) != scene.background


def test_pairs_and_backgrounds_come_as_often_as_said(sampled):
    pairs = sum(len(scene.placements) == 2 for scene in sampled) / len(sampled)
    white = Counter(scene.background for scene in sampled)["white"] / len(sampled)
    assert 0.37 < pairs < 0.43
    assert 0.3 < white < 0.42  # 30 % and a share of the rest


def test_left_in_the_caption_is_left_in_the_picture(sampled):
    names, seen = nouns(), 0
    for scene in sampled:
        if "on the left, " in scene.caption and len(scene.placements) == 2:
            left, right = sorted(scene.placements, key=lambda p: p.x)
            before, _, after = scene.caption.partition("on the left")
            assert names[left.noun] in before
            assert names[right.noun] in after
            seen += 1
    assert seen > 100


def test_a_place_in_the_caption_is_where_the_thing_stands(sampled):
    seen = Counter()
    for scene in sampled:
        if len(scene.placements) == 1:
            (placed,) = scene.placements
            # The longest that fits: "in the top left corner" holds no other, but be sure.
            for words, centre in PLACES.items():
                if words in scene.caption:
                    seen[words] += 1
                    for value, wanted in zip((placed.x, placed.y), centre, strict=True):
                        assert wanted is None or abs(value - wanted) < 0.03
    assert min(seen[words] for words in PLACES) > 10


def test_objects_stay_inside_the_picture(sampled):
    for scene in sampled:
        for p in scene.placements:
            if p.size <= 1:
                assert p.size / 2 - 0.04 <= p.x <= 1 - p.size / 2 + 0.04
                assert p.size / 2 - 0.04 <= p.y <= 1 - p.size / 2 + 0.04


def test_draw_puts_a_sprite_where_the_placement_says(square):
    scene = Scene((Placement(0, 0.5, 0.25, 0.75),), "blue", "")
    picture = (draw([scene], square)[0] + 1) * 127.5
    ink = picture[0] > 200
    ys, xs = ink.nonzero(as_tuple=True)
    assert abs(xs.float().mean() + 0.5 - 0.25 * 128) < 0.6
    assert abs(ys.float().mean() + 0.5 - 0.75 * 128) < 0.6
    assert abs(ink.sum().sqrt() - 0.5 * 96) < 2
    assert picture[:, 0, 127].tolist() == pytest.approx(COLORS["blue"], abs=0.5)


def test_draw_composes_each_scene_of_a_batch_on_its_own(square):
    one = Scene((Placement(0, 0.9, 0.5, 0.5),), "white", "")
    two = Scene((Placement(0, 0.5, 0.27, 0.4), Placement(0, 0.55, 0.72, 0.6)), "pink", "")
    together = draw([one, two], square)
    assert torch.equal(together[0], draw([one], square)[0])
    assert torch.equal(together[1], draw([two], square)[0])
    assert together.shape == (2, 3, 128, 128)
    assert together.abs().max() <= 1


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [("cat", "a cat"), ("owl", "an owl"), ("books", "books"), ("bus", "a bus"),
     ("unicorn", "a unicorn"), ("octopus", "an octopus"), ("skis", "skis"),
     ("grapes", "grapes"), ("dress", "a dress")],
)  # fmt: skip
def test_articles(noun, phrase):
    assert article(noun) == phrase


def test_the_same_seed_draws_the_same_scenes():
    assert SceneSampler(nouns(), 5).sample(50) == SceneSampler(nouns(), 5).sample(50)
    assert SceneSampler(nouns(), 5).sample(50) != SceneSampler(nouns(), 6).sample(50)


def test_a_missing_font_says_which_package_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(scenes, "FONT_LOCATIONS", (tmp_path / "none.ttf",))
    with pytest.raises(RequestError, match="fonts-noto-color-emoji"):
        find_font()
