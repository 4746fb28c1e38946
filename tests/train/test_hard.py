"""What a model draws worst is found by its own loss, and drawn for more training."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from gentron.errors import RequestError
from gentron.train import pools, video_recipe
from gentron.train.hard import MISSED_TIME, hardest, missed
from gentron.train.pools import CHUNK, LatentPool, embed
from gentron.train.recipe import Prepared
from gentron.train.scenes import SceneSampler, article
from gentron.train.video import VideoRecipe

NAMES = ["cat", "dog", "owl", "house"]


class Averages:
    """In place of an autoencoder: averages of 8x8 pixels."""

    def encode(self, pictures, return_dict):
        return (F.avg_pool2d(pictures, 8),)


def embedding(captions):
    """A number for each caption, in place of a text encoder."""
    numbers = torch.tensor([[float(sum(map(ord, caption)) % 997)] for caption in captions])
    return numbers[:, None], torch.ones(len(captions), 1, dtype=torch.int64), numbers


@pytest.fixture
def sprites():
    """Of very different strength and size, all opaque somewhere."""
    torch.manual_seed(0)
    alpha = torch.zeros(len(NAMES), 1, 128, 128)
    for k in range(len(NAMES)):
        alpha[k, :, 20 : 50 + 20 * k, 20:100] = 0.25 * (k + 1)
    return torch.cat([alpha * torch.rand(len(NAMES), 3, 1, 1), alpha], 1)


@pytest.fixture
def pool():
    zero, one = torch.zeros(3), torch.ones(3)
    hidden, mask, pooled = embedding(["a cat"])
    return LatentPool(torch.zeros(1, 3, 16, 16), zero, one, hidden, mask, pooled)


def share_missed(velocity: Callable, sprites, pool) -> list[float]:
    """`missed` of a network that is told noise, clean latents and pooled texts."""
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def forward(x, t, hidden, mask, pooled):
        assert t.tolist() == [1000 * MISSED_TIME] * len(x)
        clean = (x[:, 0] - MISSED_TIME * noise) / (1 - MISSED_TIME)
        return velocity(noise, clean, pooled)[:, None]

    return missed(forward, Averages(), sprites, NAMES, embedding, pool).tolist()


def test_a_network_that_knows_all_misses_nothing_and_one_that_draws_nothing_all(sprites, pool):
    exact = share_missed(lambda noise, clean, pooled: noise - clean, sprites, pool)
    assert exact == pytest.approx([0.0] * 4, abs=1e-6)
    white = torch.ones(3, 1, 1)
    nothing = share_missed(
        lambda noise, clean, pooled: (noise - white).expand_as(clean), sprites, pool
    )
    assert nothing == pytest.approx([1.0] * 4, rel=1e-3)  # faint and small ones no less


def test_the_noun_whose_caption_is_not_understood_is_the_hardest(sprites, pool, tmp_path):
    dog = embedding([article("dog")])[2].half().float()

    def deaf_to_dogs(noise, clean, pooled):
        return torch.where((pooled == dog)[..., None, None], noise, noise - clean)

    def measure():
        return torch.tensor(share_missed(deaf_to_dogs, sprites, pool))

    assert hardest(tmp_path / "nouns.txt", NAMES, 1, measure) == [NAMES.index("dog")]


def test_a_run_keeps_the_nouns_that_it_began_with(tmp_path):
    file = tmp_path / "nouns.txt"
    assert hardest(file, NAMES, 2, lambda: torch.tensor([0.1, 0.9, 0.2, 0.8])) == [1, 3]
    assert file.read_text() == "dog\nhouse\n"
    assert hardest(file, NAMES, 2, lambda: pytest.fail("measured again")) == [1, 3]
    with pytest.raises(
        RequestError, match="has 2: go on with --hard-nouns 2, or choose another --run"
    ):
        hardest(file, NAMES, 3, lambda: pytest.fail("measured again"))
    file.write_text("dog\nunicorn\n")
    with pytest.raises(RequestError, match="'unicorn' is no noun of the vocabulary"):
        hardest(file, NAMES, 2, lambda: pytest.fail("measured again"))


def test_scenes_show_only_what_they_may():
    scenes = SceneSampler(NAMES, 3, only=[1, 3]).sample(400)
    assert {place.noun for scene in scenes for place in scene.placements} == {1, 3}
    assert {len(scene.placements) for scene in scenes} == {1, 2}
    for scene in scenes:
        assert all(NAMES[place.noun] in scene.caption for place in scene.placements)
    everything = SceneSampler(NAMES, 3, only=range(len(NAMES))).sample(50)
    assert everything == SceneSampler(NAMES, 3).sample(50)


def test_the_recipe_draws_a_pool_of_what_its_start_draws_worst(
    sprites, pool, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(video_recipe, "_taught", lambda state, compile: seen.append(state))
    monkeypatch.setattr(
        video_recipe, "missed", lambda model, *given: torch.tensor([0.1, 0.9, 0.2, 0.8])
    )
    (tmp_path / "latents.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [2.0] * 3}))
    captions = []

    def embed_both(text, given, _seed):
        captions.extend(given)
        return embed(text, given)

    monkeypatch.setattr(pools, "embed_both", embed_both)
    ready = Prepared(NAMES, sprites, Averages(), pool, embedding, embedding([""]))
    recipe = VideoRecipe(512, 64, 1, 1, 2, hard_nouns=2)
    found = video_recipe._hard_pool(tmp_path, "mend", recipe, ready, {"a": torch.zeros(1)})
    assert (tmp_path / "mend-hard" / "nouns.txt").read_text() == "dog\nhouse\n"
    assert seen == [{"averaged": {"a": torch.zeros(1)}}]
    assert len(found.latents) == len(captions) == CHUNK  # 2 x 48 pictures, a whole chunk
    assert found.mean.tolist() == [0.5] * 3  # as the model's latents are normalised
    assert not any("cat" in caption or "owl" in caption for caption in captions)
