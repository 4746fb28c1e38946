"""The scorer knows real renderings wherever and on whatever colour, and gives nothing away."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from gentron.train.prompts import Prompt, prompt_sets, real_scene
from gentron.train.scenes import COLORS, Placement, Scene, article, draw, nouns
from gentron.train.score import Artist, blurred, judge, noise, real, see
from gentron.train.scorer import TemplateScorer, ground

pytestmark = pytest.mark.usefixtures("one_thread")

SOFT = 1.5  # pixels of blur: 27 dB against the sharp picture, as an autoencoder of this size gives


def share(scorer: TemplateScorer, prompts: Sequence[Prompt], artist: Artist, check: str) -> float:
    verdicts = [
        judge(scorer.names, prompt, see(scorer, prompt, picture))
        for prompt, picture in zip(prompts, artist(prompts), strict=True)
    ]
    return sum(verdict.checks[check] for verdict in verdicts) / len(verdicts)


def one(noun: str, background: str = "white", size: float = 0.8, x: float = 0.5) -> Scene:
    return Scene((Placement(nouns().index(noun), size, x, 0.5),), background, noun)


@pytest.fixture
def paint(font_sprites):
    return lambda scene: (draw([scene], font_sprites)[0] + 1) / 2


@pytest.fixture(scope="module")
def sets() -> dict[str, tuple[Prompt, ...]]:
    return prompt_sets(nouns())


@pytest.mark.parametrize("blur", [None, SOFT])
@pytest.mark.parametrize("name", ["nouns", "colors", "unseen-colors"])
def test_real_renderings_are_recognised_with_their_background(
    scorer, font_sprites, sets, name, blur
):
    artist = real(font_sprites, nouns(), 1)
    artist = blurred(artist, blur) if blur else artist
    assert share(scorer, sets[name][::6], artist, "all") >= 0.97


@pytest.mark.parametrize("blur", [None, SOFT])
def test_both_of_a_real_pair_are_recognised_left_and_right(scorer, font_sprites, sets, blur):
    artist = real(font_sprites, nouns(), 1)
    artist = blurred(artist, blur) if blur else artist
    assert share(scorer, sets["pairs"][::3], artist, "in order") >= 0.9


def test_pairs_on_colours_are_recognised_as_well(scorer, font_sprites):
    names = nouns()
    prompts = [
        Prompt(f"{article(a)} and {article(b)}", ((a,), (b,)), color)
        for a, b, color in zip(names[::20], names[7::20], [*COLORS] * 9, strict=False)
    ]
    assert share(scorer, prompts, real(font_sprites, names, 2), "in order") >= 0.9


def test_real_small_and_huge_things_measure_small_and_huge(scorer, font_sprites, sets):
    assert share(scorer, sets["sizes"][:40], real(font_sprites, nouns(), 1), "size") >= 0.97


def test_a_size_is_measured_as_it_was_placed(scorer, paint):
    for size in (0.4, 0.7, 1.0):
        assert scorer.look(paint(one("cat", "blue", size))).size == pytest.approx(size, abs=0.03)


@pytest.mark.parametrize("name", ["nouns", "pairs", "synonyms"])
def test_noise_is_recognised_no_better_than_by_chance(scorer, sets, name):
    assert share(scorer, sets[name][:40], noise(1), "object") <= 0.05


@pytest.mark.parametrize("color", COLORS)
def test_every_named_background_is_named(paint, color):
    assert ground(paint(one("cat", color)))[0] == color
    assert ground(paint(one("cat", color, size=1.1)))[0] == color  # it touches the border


def test_a_background_that_is_a_little_off_is_still_named_and_taken_away(scorer, paint):
    picture = (paint(one("owl", "green")) + torch.tensor([0.04, -0.03, 0.03])[:, None, None]).clamp(
        0, 1
    )
    assert scorer.judge(picture, "owl").choice == "owl"
    assert scorer.look(picture).background == "green"


def test_the_wrong_object_is_called_by_its_own_name(scorer, paint):
    verdict = scorer.judge(paint(one("cat", "yellow")), "newspaper")
    assert verdict.rank > 0
    assert verdict.choice == "cat"


def test_a_wrong_pair_is_wrong_and_half_a_pair_is_half_right(scorer, font_sprites):
    asked = Prompt("a dog and a tent", (("dog",), ("tent",)))
    drawn = real_scene(Prompt("", (("dog",), ("robot",))), nouns(), 3)
    picture = (draw([drawn], font_sprites)[0] + 1) / 2
    verdict = judge(nouns(), asked, see(scorer, asked, picture))
    assert verdict.saw == ("dog", "robot")
    assert not verdict.checks["object"]
    assert verdict.checks["one of two"]


def test_a_pair_the_other_way_round_is_right_but_not_in_order(scorer, font_sprites):
    asked = Prompt("a tent on the left, a dog on the right", (("tent",), ("dog",)))
    drawn = real_scene(Prompt("", (("dog",), ("tent",))), nouns(), 3)
    picture = (draw([drawn], font_sprites)[0] + 1) / 2
    verdict = judge(nouns(), asked, see(scorer, asked, picture))
    assert verdict.checks["object"]
    assert not verdict.checks["in order"]


def test_white_things_on_white_and_black_ones_on_black_are_recognised(scorer, paint):
    for noun, color in (("ghost", "white"), ("tooth", "white"), ("black cat", "black"),
                        ("top hat", "black")):  # fmt: skip
        assert scorer.judge(paint(one(noun, color)), noun).choice == noun


def test_a_cut_out_that_is_a_few_pixels_too_wide_changes_little(scorer, paint):
    right = 0
    for noun in nouns()[::13]:
        picture = paint(one(noun, "pink", size=0.7))
        columns = ((picture - picture[:, :1, :1]).abs().amax((0, 1)) > 0.1).nonzero()
        picture[:, 60:64, int(columns[-1]) + 3] = 0.2  # a stray line that the box must take in
        right += scorer.judge(picture, noun).rank == 0
    assert right >= 0.95 * len(nouns()[::13])


def test_an_empty_picture_shows_nothing_and_ranks_every_noun_last(scorer):
    for value in (0.0, 0.5, 1.0):
        verdict = scorer.judge(torch.full((3, 128, 128), value), "cat")
        assert verdict.choice == "nothing"
        assert verdict.rank >= len(nouns())
    left, right = scorer.look_at_pair(torch.ones(3, 128, 128))
    assert left.is_empty
    assert right.is_empty


def test_pictures_of_another_size_are_judged_alike(scorer, paint):
    picture = paint(one("penguin", "orange"))
    doubled = picture.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert scorer.judge(doubled, "penguin").choice == "penguin"
