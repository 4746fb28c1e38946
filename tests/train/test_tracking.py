"""The evaluator's own accuracy: real clips are what their captions say, and nothing else moves."""

from __future__ import annotations

import math

import pytest
import torch

from gentron.train.clip_prompts import WITH_A_FRONT
from gentron.train.clips import MOTIONS, ClipSampler, draw_clip
from gentron.train.prompts import category
from gentron.train.scenes import Placement, Scene, draw, nouns
from gentron.train.tracking import NOTHING, STILL, motion_of, steadiness, track

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = nouns()
FRONTED = [k for k, name in enumerate(NAMES) if category(name) in WITH_A_FRONT]


def real(sprites, motion, noun, seed, frames=8):
    clip = ClipSampler(NAMES, seed, frames=frames).make(noun, motion, "sky blue")
    return (draw_clip(clip, sprites) + 1) / 2


def placed(sprites, places, background="white"):
    """Frames of one noun at (size, x, y, angle) each."""
    scenes = [Scene((Placement(FRONTED[0], *place),), background, "") for place in places]
    return (draw(scenes, sprites) + 1) / 2


@pytest.mark.parametrize("motion", MOTIONS)
def test_real_clips_move_as_their_captions_say(font_sprites, motion):
    """Six nouns by lot each; those that rotate have a front."""
    generator = torch.Generator().manual_seed(len(motion))
    pool = FRONTED if motion == "rotating" else range(len(NAMES))
    chosen = [pool[k] for k in torch.randperm(len(pool), generator=generator)[:6]]
    seen = [
        motion_of(track(real(font_sprites, motion, noun, seed))).name
        for seed, noun in enumerate(chosen)
    ]
    assert seen == [motion] * 6


def test_things_that_stand_still_and_noise_move_in_no_direction(font_sprites):
    generator = torch.Generator().manual_seed(1)
    still = [real(font_sprites, None, noun, noun) for noun in range(0, 500, 100)]
    noisy = [torch.rand(8, 3, 128, 128, generator=generator) for _ in range(5)]
    assert {motion_of(track(clip)).name for clip in (*still, *noisy)} == {STILL}
    assert motion_of(track(torch.ones(8, 3, 128, 128))).name == NOTHING


def test_the_amount_is_the_one_that_was_drawn(font_sprites):
    """In sides of the picture, ratios of sizes, and degrees: against the placements."""
    middle = (0.5, 0.5, 0.5, 0.0)
    across = motion_of(
        track(placed(font_sprites, [middle, (0.5, 0.6, 0.5, 0), (0.5, 0.7, 0.4, 0)]))
    )
    assert (across.across, across.down) == (pytest.approx(0.2, abs=0.01),
                                            pytest.approx(-0.1, abs=0.01))  # fmt: skip
    sizes = [(0.4, 0.5, 0.5, 0), (0.6, 0.5, 0.5, 0), (0.8, 0.5, 0.5, 0)]
    assert motion_of(track(placed(font_sprites, sizes))).growth == pytest.approx(2, rel=0.03)
    turns = [(0.6, 0.5, 0.5, math.radians(40 * k)) for k in range(5)]
    clockwise = motion_of(track(placed(font_sprites, turns)))
    assert clockwise.turn == pytest.approx(160, abs=15)
    back = motion_of(track(placed(font_sprites, turns[::-1])))
    assert back.turn == pytest.approx(-160, abs=15)


def test_half_of_the_least_that_training_showed_does_not_count(font_sprites):
    def shifted(way):
        return placed(font_sprites, [(0.5, 0.5 - way / 2 + way * k / 7, 0.5, 0) for k in range(8)])

    assert motion_of(track(shifted(0.12))).name == STILL
    assert motion_of(track(shifted(0.16))).name == "right"


def test_a_way_that_turns_back_is_a_bounce_and_no_fall(font_sprites):
    heights = [0.7, 0.5, 0.4, 0.5, 0.7]
    bounce = placed(font_sprites, [(0.5, 0.5, y, 0) for y in heights])
    assert motion_of(track(bounce)).name == "bouncing"
    fall = placed(font_sprites, [(0.5, 0.5, y, 0) for y in sorted(heights)])
    assert motion_of(track(fall)).name == "down"


def test_steadiness_sees_a_change_of_look_and_no_change_of_place(font_sprites):
    moving = real(font_sprites, "left", 3, 0)
    others = [real(font_sprites, "left", noun, 0) for noun in range(40, 360, 40)]
    changing = torch.stack([clip[k] for k, clip in enumerate(others)])
    turning = track(real(font_sprites, "rotating", FRONTED[0], 0))
    assert steadiness(track(moving), turning=False) > 0.98
    assert steadiness(track(changing), turning=False) < 0.9
    assert steadiness(turning, turning=True) > 0.9 > steadiness(turning, turning=False)


def test_frames_that_show_nothing_are_left_out(font_sprites):
    clip = real(font_sprites, "right", 5, 0)
    clip[2] = clip[2, :, :1, :1]
    path = track(clip)
    assert (len(path.x), path.of) == (7, 8)
    assert motion_of(path).name == "right"
    clip[3:] = clip[2]
    assert motion_of(track(clip)).name == NOTHING


def test_what_is_turned_is_recognised_at_any_angle(scorer, font_sprites):
    noun, upright = NAMES.index("crocodile"), []
    for angle in (0.7, 2.1, 3.9, 5.5):
        scenes = [Scene((Placement(noun, 0.55, 0.45, 0.5, angle),), "sky blue", "")]
        picture = (draw(scenes, font_sprites)[0] + 1) / 2
        sighting = scorer.look_turned(picture)
        assert (sighting.first_choice(NAMES), sighting.background) == ("crocodile", "sky blue")
        upright.append(scorer.look(picture).first_choice(NAMES))
    assert upright.count("crocodile") < 2
    assert scorer.look_turned(torch.ones(3, 128, 128)).is_empty
