"""Verdicts, shares and comparisons, on sightings and pictures whose answer is known."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from gentron.bundle import locate
from gentron.train.prompts import Prompt, prompt_sets
from gentron.train.scenes import nouns
from gentron.train.score import (
    CHECKS,
    GENERATED,
    OTHER_PROMPT,
    autoencoder_of,
    blurred,
    by_category,
    judge,
    noise,
    real,
    reconstructed,
    score_sets,
    worst,
)
from gentron.train.scorer import NOTHING, Sighting

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["cat", "dog", "owl", "fox", "bat", "pig", "hen"]
CAT, DOG = (("cat",),), (("dog",),)


def sighting(*order: str, background: str = "white", size: float = 0.8) -> Sighting:
    """These nouns are nearest, in this order; the others follow in theirs."""
    ranked = [*order, *(name for name in NAMES if name not in order)]
    distances = torch.tensor([float(ranked.index(name)) for name in NAMES])
    return Sighting(background, distances, size)


def nothing() -> Sighting:
    return Sighting("white", torch.full((len(NAMES),), NOTHING), 0.0)


def checks(prompt: Prompt, *seen: Sighting) -> set[str]:
    return {name for name, right in judge(NAMES, prompt, seen).checks.items() if right}


def test_the_first_choice_is_right_and_the_second_among_the_first_five():
    prompt = Prompt("a cat", CAT)
    assert {"object", "first five", "background", "all"} <= checks(prompt, sighting("cat"))
    second = checks(prompt, sighting("dog", "cat"))
    assert "first five" in second
    assert not {"object", "all"} & second
    assert "first five" not in checks(prompt, sighting("dog", "owl", "fox", "bat", "pig", "cat"))


def test_any_accepted_noun_will_do():
    prompt = Prompt("a pet", (("dog", "cat"),), None)
    assert "object" in checks(prompt, sighting("cat", background="red"))
    assert "object" in checks(prompt, sighting("dog"))
    assert judge(NAMES, prompt, (sighting("owl", "fox", "dog"),)).ranks == (2,)


def test_object_and_background_are_right_apart_and_together():
    prompt = Prompt("a cat on a blue background", CAT, "blue")
    assert "all" in checks(prompt, sighting("cat", background="blue"))
    assert "all" not in checks(prompt, sighting("cat", background="sky blue"))
    wrong = checks(prompt, sighting("dog", background="blue"))
    assert "background" in wrong
    assert not {"object", "all"} & wrong


@pytest.mark.parametrize(
    ("word", "size", "right"),
    [("small", 0.4, True), ("small", 0.7, False), ("huge", 1.0, True), ("huge", 0.8, False)],
)
def test_size_goes_in_the_direction_asked_for(word, size, right):
    found = checks(Prompt(f"a {word} cat", CAT, size=word), sighting("cat", size=size))
    assert ("size" in found) == right
    assert ("all" in found) == right


def test_nothing_is_neither_small_nor_a_cat():
    assert not {"size", "object", "first five"} & checks(Prompt("", CAT, size="small"), nothing())
    assert judge(NAMES, Prompt("", CAT), (nothing(),)).saw == ("nothing",)


def test_a_pair_needs_both_in_either_order():
    prompt = Prompt("a cat and a dog", CAT + DOG)
    straight = checks(prompt, sighting("cat"), sighting("dog"))
    crossed = checks(prompt, sighting("dog"), sighting("cat"))
    half = checks(prompt, sighting("dog"), sighting("owl"))
    twice = checks(prompt, sighting("cat"), sighting("cat"))
    assert {"object", "one of two", "in order"} <= straight
    assert {"object", "one of two"} <= crossed
    assert "in order" not in crossed
    for found in (half, twice):
        assert "one of two" in found
        assert not {"object", "in order"} & found


def test_a_verdict_is_json_even_of_an_empty_picture():
    values = judge(NAMES, Prompt("a cat", CAT), (nothing(),)).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False))["distance"] is None
    seen = judge(NAMES, Prompt("a cat", CAT), (sighting("dog", "cat"),)).to_dict()
    assert seen["ranks"] == (1,)
    assert "first five" in seen["right"]


@pytest.fixture(scope="module")
def few():
    sets = prompt_sets(nouns())
    return {name: found[5:17] for name, found in sets.items()}


@pytest.fixture(scope="module")
def results(scorer, font_sprites, few):
    """A perfect model, held against noise."""
    truth = real(font_sprites, nouns(), 3)
    return score_sets(scorer, few, lambda name: truth, {"noise": noise(0)})


def test_a_perfect_model_scores_everything_and_noise_nothing(results):
    for result in results:
        headline = CHECKS[result.name][0]
        assert result.count == 12
        assert result.shares()[headline] >= 11 / 12, result.name
        if result.name != "sizes":
            assert result.shares("noise")[headline] <= 1 / 12, result.name


def test_a_perfect_models_pictures_are_wrong_for_other_prompts(results):
    for result in results:
        assert result.shares(OTHER_PROMPT)[CHECKS[result.name][0]] <= 1 / 12, result.name


def test_a_model_that_draws_the_wrong_things_scores_nothing(scorer, font_sprites, few):
    truth = real(font_sprites, nouns(), 3)

    def deaf(prompts):
        return [*truth([*prompts[1:], prompts[0]])]

    (result,) = score_sets(scorer, {"nouns": few["nouns"]}, lambda name: deaf, {})
    assert result.shares()["object"] == 0
    assert result.shares()["background"] == 1


def test_pictures_too_few_or_too_many_are_an_error(scorer, few):
    with pytest.raises(ValueError, match="zip"):
        score_sets(scorer, {"nouns": few["nouns"]}, lambda name: lambda prompts: [], {})


def test_every_picture_is_watched(scorer, few):
    seen = []
    score_sets(
        scorer, {"nouns": few["nouns"]}, lambda name: noise(0), {"noise": noise(1)},
        watch=lambda *event: seen.append(event),
    )  # fmt: skip
    assert seen[0] == ("nouns", "noise", 1, 12)
    assert seen[-1] == ("nouns", GENERATED, 12, 12)
    assert len(seen) == 24


def test_categories_add_up_to_the_whole(results):
    result = next(r for r in results if r.name == "colors")
    groups = by_category(result)
    assert sum(count for count, _ in groups.values()) == result.count
    whole = sum(count * shares["object"] for count, shares in groups.values()) / result.count
    assert whole == pytest.approx(result.shares()["object"])


def test_the_worst_have_the_highest_ranks_and_then_the_greatest_distances(scorer, few):
    found = score_sets(scorer, few, lambda name: noise(0), {})
    by_name = {result.name: result for result in found}
    verdicts = [by_name[name].verdicts[GENERATED][row] for name, row in worst(found, 1000)]
    keys = [(max(verdict.ranks), verdict.distance) for verdict in verdicts]
    assert keys == sorted(keys, reverse=True)
    assert len(verdicts) == sum(map(len, few.values()))
    assert len(worst(found, 5)) == 5


def test_real_pictures_are_the_same_whoever_asks_and_in_whatever_order(font_sprites, few):
    truth, prompts = real(font_sprites, nouns(), 3), list(few["pairs"])
    once = dict(zip(prompts, truth(prompts), strict=True))
    random.Random(0).shuffle(prompts)
    for prompt, picture in zip(prompts, truth(prompts), strict=True):
        assert torch.equal(picture, once[prompt])
    other = [*real(font_sprites, nouns(), 4)(prompts)]
    assert not torch.equal(other[0], once[prompts[0]])


def test_blur_keeps_the_mean_and_flattens_an_edge():
    edge = torch.zeros(3, 32, 32)
    edge[:, :, 16:] = 1
    (soft,) = blurred(lambda prompts: [edge], 2.0)([])
    assert soft.mean() == pytest.approx(0.5, abs=1e-4)
    # The derivative of a blurred step is the kernel: 1 / (sigma sqrt(2 pi)) at the edge.
    slope = float(soft[0, 16, 16] - soft[0, 16, 15])
    assert slope == pytest.approx(1 / (2 * math.sqrt(2 * math.pi)), rel=0.03)


def test_the_bundles_autoencoder_gives_back_pictures_that_are_still_recognised(
    scorer, font_sprites, few
):
    autoencoder = autoencoder_of(locate("emoji"))
    assert autoencoder is not None
    truth = real(font_sprites, nouns(), 3)
    rebuilt = reconstructed(truth, autoencoder)
    (result,) = score_sets(scorer, {"colors": few["colors"]}, lambda name: rebuilt, {})
    assert result.shares()["all"] >= 11 / 12
    before, after = next(iter(truth(few["colors"]))), next(iter(rebuilt(few["colors"])))
    assert 0 < (before - after).abs().mean() < 0.1


def test_an_autoencoder_that_draws_lots_is_not_used(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert autoencoder_of(tmp_path) is None
