"""Clips move as their captions say, and what is held out is never shown."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from gentron.train.clips import (
    FRAMES,
    HELD_OUT,
    MOTIONS,
    OPPOSITES,
    ClipSampler,
    backwards,
    draw_clip,
    held_out_motions,
)
from gentron.train.scenes import Placement, Scene, draw, held_out_color

NAMES = ["cat", "automobile", "red apple", "house", "orange"]


@pytest.fixture(scope="module")
def sprites():
    """Shapes that are not symmetric: a bar and a corner."""
    sprite = torch.zeros(len(NAMES), 4, 128, 128)
    sprite[:, 3, 20:108, 50:78] = 1
    sprite[:, 3, 20:44, 50:108] = 1
    sprite[:, 0] = sprite[:, 3]
    return sprite


def ink(frames):
    """Centre (x, y) and area of what is not background, frame by frame."""
    background = frames[:, :, :1, :1]
    mass = (frames - background).abs().sum(1)
    total = mass.sum((1, 2))
    axis = torch.linspace(0, 1, mass.shape[-1])
    return (mass * axis).sum((1, 2)) / total, (mass * axis[:, None]).sum((1, 2)) / total, total


def clip_of(motion, seed=0):
    return ClipSampler(NAMES, seed).make(1, motion, "white")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)]
)
def test_things_move_the_way_the_caption_says(sprites, motion, axis, sign, seed):
    *centre, _ = ink(draw_clip(clip_of(motion, seed), sprites))
    steps = centre[axis].diff() * sign
    assert (steps > 0.02).all()
    assert centre[1 - axis].std() < 0.005


def test_growing_grows_and_shrinking_shrinks(sprites):
    for motion, sign in (("growing", 1), ("shrinking", -1)):
        area = ink(draw_clip(clip_of(motion), sprites))[2]
        assert (area.diff() * sign > 0).all()


def test_rotating_turns_in_place_and_still_things_do_not_move(sprites):
    turning, still = (draw_clip(clip_of(motion), sprites) for motion in ("rotating", None))
    assert (turning[1:] - turning[:-1]).abs().mean() > 0.005
    assert torch.equal(still[1:], still[:-1])
    assert ink(turning)[2].std() / ink(turning)[2].mean() < 0.05


@pytest.mark.parametrize("seed", range(10))
def test_what_bounces_leaves_its_floor_once_and_comes_back(seed):
    places = [scene.placements[0] for scene in clip_of("bouncing", seed).frames]
    floor = 1 - places[0].size / 2 - 0.04
    assert places[0].y == pytest.approx(floor)
    assert places[-1].y == pytest.approx(floor)
    ways = [math.copysign(1, later.y - earlier.y) for earlier, later in pairwise(places)]
    assert ways[:3] + ways[4:] == [-1, -1, -1, 1, 1, 1]
    assert floor - min(p.y for p in places) > 0.2


@pytest.mark.parametrize("seed", range(3))
def test_what_rotates_makes_a_quarter_turn_clockwise(seed):
    turn = [scene.placements[0].angle for scene in clip_of("rotating", seed).frames]
    assert turn == pytest.approx([math.pi / 2 * k / 7 for k in range(8)])


def test_twice_as_many_clips_rotate_as_make_any_other_motion():
    made = Counter(clip.motion for clip in ClipSampler(["ball"], 1).sample(4000))
    others = set(MOTIONS) - {"rotating"} - held_out_motions("ball")
    assert "rotating" in made
    for motion in others:
        assert 1.7 < made["rotating"] / made[motion] < 2.3


@pytest.mark.parametrize("motion", OPPOSITES)
def test_a_clip_run_backwards_shows_the_opposite(sprites, motion):
    both = {motion, OPPOSITES[motion]}
    noun = next(n for n, name in enumerate(NAMES) if not held_out_motions(name) & both)
    clip = ClipSampler(NAMES, 3).make(noun, motion, "sky blue")
    turned = backwards(clip, NAMES[noun])
    assert turned.motion == OPPOSITES[motion]
    assert turned.caption == clip.caption.replace(MOTIONS[motion], MOTIONS[OPPOSITES[motion]])
    assert torch.equal(draw_clip(turned, sprites), draw_clip(clip, sprites).flip(0))
    assert backwards(turned, NAMES[noun]) == clip


@pytest.mark.parametrize("motion", [*MOTIONS.keys() - OPPOSITES.keys(), None])
def test_some_clips_have_no_opposite(motion):
    assert backwards(clip_of(motion), NAMES[1]) is None


def test_a_held_out_motion_is_not_shown_backwards_either():
    names = [f"noun {k}" for k in range(50)]
    for clip in ClipSampler(names, 0).sample(500):
        turned = backwards(clip, names[clip.noun])
        assert turned is None or turned.motion not in held_out_motions(names[clip.noun])


def test_a_noun_named_like_a_motion_keeps_its_name():
    names = (f"growing heart {k}" for k in range(99))
    name = next(n for n in names if not held_out_motions(n) & {"growing", "shrinking"})
    turned = backwards(ClipSampler([name], 0).make(0, "growing", "white"), name)
    assert turned.caption.startswith(f"a {name} shrinking")


def test_a_quarter_turn_is_clockwise(sprites):
    """The corner of the shape is top right; after a quarter turn it is bottom right."""

    def corner(angle):
        (picture,) = draw([Scene((Placement(0, 0.9, 0.5, 0.5, angle),), "white", "")], sprites)
        dark = (picture[1] < 0).float()
        quarters = dark.unfold(0, 64, 64).unfold(1, 64, 64).sum((2, 3))
        return divmod(int(quarters.argmax()), 2)  # (row, column)

    assert corner(0.0) == (0, 1)
    assert corner(math.pi / 2) == (1, 1)


def test_no_noun_makes_its_held_out_motions_or_stands_on_its_held_out_colour():
    for clip in ClipSampler(NAMES, 3).sample(2000):
        assert clip.motion not in held_out_motions(NAMES[clip.noun])
        assert clip.background != held_out_color(NAMES[clip.noun])


def test_every_other_pair_of_noun_and_motion_is_trained():
    seen = {(clip.noun, clip.motion) for clip in ClipSampler(NAMES, 4).sample(3000)}
    assert len(seen) == len(NAMES) * (len(MOTIONS) - HELD_OUT + 1)  # and standing still


def test_captions_name_object_motion_and_background():
    for clip in ClipSampler(NAMES, 5).sample(300):
        assert NAMES[clip.noun] in clip.caption
        assert (MOTIONS[clip.motion] if clip.motion else "standing still") in clip.caption
        assert clip.background == "white" or clip.background in clip.caption
        assert len(clip.frames) == FRAMES


def test_the_same_seed_gives_the_same_clips():
    first, again = (ClipSampler(NAMES, 6).sample(20) for _ in range(2))
    assert first == again
    assert first != ClipSampler(NAMES, 7).sample(20)
