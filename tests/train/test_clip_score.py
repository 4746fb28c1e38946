"""Forty fixed prompts, and what is right about a clip."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gentron.errors import RequestError
from gentron.train import clip_prompts as prompts_module
from gentron.train.clip_prompts import clip_prompts, digest, real_clip, select_prompts
from gentron.train.clip_score import (
    judge_clips,
    judge_others,
    noise,
    real,
    reconstructed,
    summary,
)
from gentron.train.clips import MOTIONS, held_out_motions
from gentron.train.prompts import category
from gentron.train.scenes import held_out_color, nouns

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = nouns()
PROMPTS = clip_prompts(NAMES)
WORDS = [
    "cat",
    "dog",
    "bus",
    "key",
    "tent",
    "fish",
    "star",
    "bread",
    "lion",
    "bear",
    "wolf",
    "taxi",
    "ship",
    "train",
    "owl",
    "duck",
    "frog",
    "snake",
    "apple",
    "chair",
    "bed",
    "book",
    "pen",
    "drum",
    "kite",
    "bell",
    "door",
    "clock",
    "house",
    "tree",
]


def test_forty_prompts_five_of_each_motion_half_of_all_pairs_never_trained():
    assert len(PROMPTS) == 40
    assert Counter(p.motion for p in PROMPTS) == dict.fromkeys(MOTIONS, 5)
    assert sum(p.trained for p in PROMPTS) == 20
    for prompt in PROMPTS:
        assert (prompt.motion in held_out_motions(prompt.noun)) is not prompt.trained
        assert prompt.background != held_out_color(prompt.noun)
        assert prompt.noun in prompt.text
        assert MOTIONS[prompt.motion] in prompt.text
        assert prompt.text.endswith(f"{prompt.background} background")
    assert len({p.noun for p in PROMPTS}) == 40
    rotating = {category(p.noun) for p in PROMPTS if p.motion == "rotating"}
    assert rotating <= set(prompts_module.WITH_A_FRONT)


def test_the_prompts_never_change():
    """Scores of two models compare only where they were asked the same."""
    small = clip_prompts(WORDS)
    assert small[0].text == "a house moving left on a red background"
    assert digest(small) == "d8bfb145190b650eb3564edc53814f34b99b580c7550d2afa0d9723c26addb34"


def test_a_sample_holds_both_kinds_and_is_always_the_same():
    few = select_prompts(PROMPTS, 8)
    assert Counter(p.trained for p in few) == {True: 4, False: 4}
    assert few == select_prompts(PROMPTS, 8)
    assert select_prompts(PROMPTS, None) == select_prompts(PROMPTS, 99) == PROMPTS


def test_a_vocabulary_without_a_noun_for_some_motion_is_refused():
    with pytest.raises(RequestError, match="train it with more nouns"):
        clip_prompts(["cat", "dog"])


def test_the_evaluator_is_right_about_real_clips_and_gives_nothing_away(scorer, font_sprites):
    some = select_prompts(PROMPTS, 8)
    truth = real(font_sprites, NAMES, 0, 8, still=False)
    verdicts, sights = judge_clips(scorer, some, truth)
    found = summary(verdicts)
    assert found["groups"]["all"]["clips"] == 8
    assert found["groups"]["trained"]["clips"] == found["groups"]["unseen"]["clips"] == 4
    for group in found["groups"].values():
        assert group["object"] > 0.95
        assert group["background"] == 1
        assert group["motion"] == 1
    assert found["steadiness"] > 0.97
    others = summary(judge_others(NAMES, some, sights))["groups"]["all"]
    assert others["object"] < 0.05
    assert others["motion"] < 0.3
    still = summary(judge_clips(scorer, some, real(font_sprites, NAMES, 0, 8, still=True))[0])
    assert still["groups"]["all"]["motion"] == 0
    assert still["groups"]["all"]["object"] > 0.95
    nothing = summary(judge_clips(scorer, some, noise(0, 8))[0])["groups"]["all"]
    assert nothing["object"] < 0.05
    assert nothing["motion"] == 0


def test_a_clip_of_the_wrong_thing_the_wrong_way_is_wrong(scorer, font_sprites):
    asked = next(p for p in PROMPTS if p.motion == "left")
    shown = next(p for p in PROMPTS if p.motion == "growing")
    ((verdict,), _) = judge_clips(
        scorer, [asked], lambda _: real(font_sprites, NAMES, 0, 8, still=False)([shown])
    )
    assert not verdict.moves
    assert verdict.motion.name == "growing"
    assert not any(verdict.objects)
    assert set(verdict.saw) == {shown.noun}
    values = verdict.to_dict()
    assert values["saw_motion"]["name"] == "growing"
    assert values["motion_right"] is False


def test_half_of_the_frames_can_be_right(scorer, font_sprites):
    asked = next(p for p in PROMPTS if p.motion == "right")
    (clip,) = real(font_sprites, NAMES, 0, 8, still=False)([asked])
    clip[4:] = clip[4:, :, :1, :1]  # empties the later frames
    ((verdict,), _) = judge_clips(scorer, [asked], lambda _: [clip])
    assert sum(verdict.objects) == 4
    assert summary([verdict])["groups"]["all"]["object"] == 0.5


def test_a_real_clip_is_the_same_every_time_and_moves_or_not():
    first, again = (real_clip(PROMPTS[0], NAMES, 3) for _ in range(2))
    assert first == again
    assert first != real_clip(PROMPTS[0], NAMES, 4)
    still = real_clip(PROMPTS[0], NAMES, 3, still=True)
    assert len(set(still.frames)) == 1
    assert len(real_clip(PROMPTS[0], NAMES, 3, frames=5).frames) == 5


def test_the_autoencoders_clips_are_its_own(scorer, font_sprites):
    """An autoencoder that only knows black shows what a black one would be worth."""

    class Black(torch.nn.Module):
        def encode(self, x, return_dict):
            return (x,)

        def decode(self, x, return_dict):
            return (torch.full_like(x, -1.0),)

    filmer = reconstructed(real(font_sprites, NAMES, 0, 8, still=False), Black())
    (verdict,) = judge_clips(scorer, PROMPTS[:1], filmer)[0]
    assert verdict.motion.name == "nothing"
    assert not any(verdict.objects)
