"""The prompts are fixed, cover the vocabulary, and ask for what training never showed."""

from __future__ import annotations

import tomllib
from collections import Counter
from importlib.resources import files

import pytest
import torch

from gentron.bundle import locate
from gentron.errors import RequestError
from gentron.train import prompts
from gentron.train.prompts import (
    HUGE_ABOVE,
    OTHER,
    SIZES,
    SMALL_BELOW,
    SYNONYMS,
    category,
    digest,
    noise_seed,
    prompt_sets,
    real_scene,
    select_sets,
    vocabulary,
)
from gentron.train.scenes import (
    COLORS,
    PLACES,
    VERBS,
    SceneSampler,
    article,
    held_out_color,
    nouns,
)
from gentron.train.score import at_place
from gentron.train.scorer import Sighting
from gentron.train.wording import wordings

FIXED = "a2704ca635f36a82720de5227862bdd2d97d24e4401581cfb08f2e493f26866e"


@pytest.fixture(scope="module")
def sets():
    return prompt_sets(nouns())


@pytest.fixture(scope="module")
def sampled():
    return SceneSampler(nouns(), 0, known=wordings()).sample(30_000)


def trained(sampled):
    """Nouns and the backgrounds they were seen on."""
    names = nouns()
    return {(names[p.noun], scene.background) for scene in sampled for p in scene.placements}


def test_the_prompts_are_those_that_were_published(sets):
    """Another digest means that scores before and after cannot be compared: say so in CHANGELOG."""
    assert digest(sets) == FIXED


def test_what_counts_as_right_is_part_of_the_digest(sets):
    changed = dict(sets)
    changed["synonyms"] = (*sets["synonyms"][:-1], sets["nouns"][0])
    assert digest(changed) != digest(sets)


@pytest.mark.parametrize("name", ["nouns", "colors", "unseen-colors"])
def test_every_noun_is_asked_for_once(sets, name):
    assert [prompt.wanted for prompt in sets[name]] == [((noun,),) for noun in nouns()]


def test_unseen_colours_never_occur_in_training(sets, sampled):
    unseen = {(p.wanted[0][0], p.background) for p in sets["unseen-colors"]}
    assert not unseen & trained(sampled)
    assert all(held_out_color(noun) == color for noun, color in unseen)


def test_trained_colours_do_occur_in_training(sets, sampled):
    asked = {(p.wanted[0][0], p.background) for p in sets["colors"]}
    assert len(asked & trained(sampled)) > 0.9 * len(asked)  # 30,000 scenes show most combinations
    assert {color for _, color in asked} == set(COLORS) - {"white"}


def test_prompts_name_what_they_want(sets):
    for name in ("nouns", "colors", "unseen-colors", "pairs", "sizes", "places"):
        for prompt in sets[name]:
            assert all(accepted[0] in prompt.text for accepted in prompt.wanted)
            assert prompt.background == "white" or prompt.background in prompt.text


def test_pairs_use_every_verb_and_position_of_training(sets):
    assert len(sets["pairs"]) == 200
    used = Counter(
        next((verb for verb in sorted(VERBS, key=len, reverse=True)
              if p.text == f"{article(p.wanted[0][0])} {verb} {article(p.wanted[1][0])}"), "left")
        for p in sets["pairs"]
    )  # fmt: skip
    assert set(used) == {*VERBS, "left"}
    assert all(p.wanted[0] != p.wanted[1] for p in sets["pairs"])


def test_synonyms_are_in_no_caption_and_their_answers_in_the_vocabulary(sets, sampled):
    assert len(sets["synonyms"]) == len(SYNONYMS) >= 30
    captions = {f" {scene.caption.replace(',', ' ,')} ".lower() for scene in sampled}
    for prompt in sets["synonyms"]:
        assert set(prompt.wanted[0]) <= set(nouns())
        said = f" {prompt.text.lower()} "
        assert not any(said in caption for caption in captions), prompt.text


def test_sizes_lie_apart_from_those_of_plain_captions():
    """What training calls small and huge, measured against the thresholds."""
    for scene in SceneSampler(nouns(), 1, pairs=0).sample(3000):
        size = scene.placements[0].size
        if any(place in scene.caption for place in PLACES):
            assert size < SMALL_BELOW, scene.caption  # room to be in a corner
        elif any(word in scene.caption for word in (" small ", " tiny ", "small ", "tiny ")):
            assert size < SMALL_BELOW, scene.caption
        elif any(scene.caption.startswith(word) for word in ("huge ", "a huge ")):
            assert size > HUGE_ABOVE, scene.caption
        else:
            assert size > SMALL_BELOW, scene.caption
    assert SIZES["small"][1] < SMALL_BELOW < HUGE_ABOVE < SIZES["huge"][0]


def test_categories_hold_every_noun_exactly_once():
    text = files("gentron.train").joinpath("categories.toml").read_text("utf-8")
    grouped = Counter(noun for group in tomllib.loads(text).values() for noun in group)
    assert grouped == Counter(nouns())
    assert category("zebra") == "land animals"
    assert category("a noun of another vocabulary") == OTHER


def test_the_vocabulary_is_the_bundles_own(tmp_path):
    own = locate("emoji") / "nouns.txt"
    assert vocabulary(own.parent) == own.read_text("utf-8").splitlines()
    assert vocabulary(tmp_path) == nouns()
    (tmp_path / "nouns.txt").write_text("cat\ndog\n")
    assert vocabulary(tmp_path) == ["cat", "dog"]
    (tmp_path / "nouns.txt").write_text("cat\ncat\n")
    with pytest.raises(RequestError, match="each once"):
        vocabulary(tmp_path)


def test_a_small_vocabulary_has_prompts_of_its_own_nouns():
    sets = prompt_sets(["cat", "dog", "owl"])
    wanted = {n for found in sets.values() for p in found for w in p.wanted for n in w}
    assert wanted == {"cat", "dog", "owl"}
    assert [p.text for p in sets["synonyms"]] == ["a puppy", "a kitty"]


def test_a_sample_is_the_same_every_time_and_in_order(sets):
    once, again = (select_sets(sets, ["pairs", "nouns"], 10) for _ in range(2))
    assert once == again
    assert list(once) == ["nouns", "pairs"]
    assert [len(found) for found in once.values()] == [10, 10]
    order = [sets["nouns"].index(prompt) for prompt in once["nouns"]]
    assert order == sorted(order)
    assert select_sets(sets, None, None) == sets


def test_an_unknown_set_is_refused_with_those_there_are(sets):
    with pytest.raises(RequestError, match="unseen-colors"):
        select_sets(sets, ["verbs"], None)


def test_a_prompts_noise_depends_on_the_prompt_and_the_seed_alone():
    assert noise_seed("a cat", 0) == noise_seed("a cat", 0) < 2**32
    assert len({noise_seed(text, seed) for text in ("a cat", "a dog") for seed in (0, 1)}) == 4
    assert noise_seed("a cat", 2**32 - 1) < 2**64


def test_real_scenes_show_what_is_asked_for(sets):
    for name, found in sets.items():
        for prompt in found[:20]:
            scene = real_scene(prompt, nouns(), 5)
            shown = [nouns()[placement.noun] for placement in scene.placements]
            assert all(noun in right for noun, right in zip(shown, prompt.wanted, strict=True))
            assert prompt.background in (None, scene.background), name
            if prompt.size:
                low, high = SIZES[prompt.size]
                assert low <= scene.placements[0].size <= high
            if prompt.place:
                (placed,) = scene.placements
                assert at_place(Sighting("", torch.ones(1), 0.5, placed.x, placed.y), prompt.place)
    assert real_scene(sets["nouns"][0], nouns(), 5) != real_scene(sets["nouns"][0], nouns(), 6)


def test_numbers_of_prompts_are_as_documented(sets):
    assert {name: len(found) for name, found in sets.items()} == {
        "nouns": len(nouns()),
        "colors": len(nouns()),
        "unseen-colors": len(nouns()),
        "pairs": prompts.NUM_PAIRS,
        "sizes": 2 * prompts.NUM_SIZED,
        "places": prompts.NUM_PLACED,
        "synonyms": len(SYNONYMS),
    }
