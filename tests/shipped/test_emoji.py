"""The packaged bundle: really trained, small enough, and it draws what it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gentron.bundle import Bundle, locate
from gentron.errors import RequestError
from gentron.runtime import Pipeline

ROOT = Path(__file__).resolve().parents[2]
FIXED = {
    "a tomato": "tomato",
    "a floppy disk": "floppy disk",
    "a basketball": "basketball",
    "a safety vest on a blue background": "safety vest",
    "fire": "fire",
    "a lime": "lime",
    "a peach on a grey background": "peach",
    "a barber pole": "barber pole",
    "a jack-o-lantern": "jack-o-lantern",
    "a laptop": "laptop",
}


@pytest.fixture(scope="module")
def emoji() -> Iterator[Pipeline]:
    with Pipeline.load("emoji", backend="onnxruntime") as pipeline:
        yield pipeline


def test_the_weights_are_trained_and_the_licences_are_there(emoji):
    manifest = emoji.bundle.manifest
    assert manifest.weights == "trained"
    assert manifest.provenance["denoiser_steps"] > 1000
    assert {entry["licence"] for entry in manifest.licences} == {"Apache-2.0", "OFL-1.1"}
    for name in ("Apache-2.0.txt", "OFL-1.1.txt"):
        assert f"LICENSES/{name}" in manifest.files
    assert not any("random" in warning for warning in emoji("a cat", seed=1, steps=1).warnings)


def test_no_file_is_over_30_mb():
    sizes = {f: f.stat().st_size for f in locate("emoji").rglob("*") if f.is_file()}
    assert max(sizes.values()) < 30_000_000
    assert sum(sizes.values()) < 100_000_000


def nouns_of(pipeline: Pipeline) -> list[str]:
    """What it was trained on, which the recipe's own list may have outgrown."""
    return (pipeline.bundle.path / "nouns.txt").read_text("utf-8").split("\n")[:-1]


def test_the_recipe_still_knows_every_noun_it_was_trained_on(emoji):
    from gentron.train.scenes import nouns

    assert len(nouns_of(emoji)) == len(set(nouns_of(emoji))) >= 500
    assert set(nouns_of(emoji)) <= set(nouns())


def test_backgrounds_have_the_colour_that_was_asked_for(emoji):
    from gentron.train.scenes import COLORS

    right = 0
    cases = [
        ("a dog", "blue"),
        ("a guitar", "red"),
        ("a house", "grey"),
        ("a car", "green"),
        ("a robot", "pink"),
        ("a star", "purple"),
        ("a fish", "yellow"),
        ("a key", "black"),
    ]
    for subject, color in cases:  # fmt: skip
        image = emoji(f"{subject} on a {color} background", seed=7).images[0].astype(float)
        corners = np.stack([image[2, 2], image[2, -3], image[-3, 2], image[-3, -3]])
        distance = {
            name: np.linalg.norm(np.median(corners, axis=0) - value)
            for name, value in COLORS.items()
        }
        right += min(distance, key=distance.__getitem__) == color
    assert right >= 7


@pytest.fixture(scope="module")
def scorer(emoji):
    from gentron.train.scenes import find_font, load_sprites
    from gentron.train.scorer import TemplateScorer

    names = nouns_of(emoji)
    try:
        return TemplateScorer(load_sprites(find_font(), names), names)
    except RequestError:
        pytest.skip("needs NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji)")


def drawn(emoji: Pipeline, prompt: str) -> torch.Tensor:
    from gentron.train.prompts import noise_seed

    image = emoji(prompt, seed=noise_seed(prompt, 0)).images[0]
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def test_ten_fixed_prompts_are_recognised(emoji, scorer):
    """Chosen among those it draws well: a guard against what breaks pictures, not a score."""
    ranks = {noun: scorer.judge(drawn(emoji, prompt), noun) for prompt, noun in FIXED.items()}
    assert sum(rank.rank == 0 for rank in ranks.values()) >= 8, ranks


def test_things_are_recognised_far_more_often_than_by_chance(emoji, scorer):
    """Among the first five of all nouns, by a scorer that has only seen renderings of the font.
    Chance is 0.9 %; every fifteenth noun is asked for, none is picked."""
    from gentron.train.scenes import article

    ranks = {noun: scorer.judge(drawn(emoji, article(noun)), noun).rank
             for noun in scorer.names[::15]}  # fmt: skip
    assert sum(rank < 5 for rank in ranks.values()) / len(ranks) > 0.6, ranks


def test_the_frames_of_a_clip_belong_together(emoji):
    """They differ, but less than clips of other seeds do."""
    clips = [np.concatenate([*emoji.stream_video("a mushroom", seed=s)]) for s in (1, 2)]
    one, other = (clip.astype(float) for clip in clips)
    assert one.shape == (8, 128, 128, 3)
    between = np.abs(one[1:] - one[:-1]).mean()
    assert 0 < between < 0.7 * np.abs(one - other).mean()


@pytest.mark.parametrize("size", [(128, 96), (96, 160), (64, 64)])
def test_other_sizes_and_shapes_work(emoji, size):
    image = emoji("a cat", seed=1, steps=4, size=size).images[0]
    assert image.shape == (size[1], size[0], 3)
    assert image.std() > 5


def test_solvers_agree_when_given_many_steps(emoji):
    """Every solver walks to the same picture from the same noise."""
    fine = {s: emoji("a penguin", seed=3, steps=100, solver=s, guidance=2.0).latents
            for s in ("euler", "dpm++2m", "unipc")}  # fmt: skip
    for name in ("dpm++2m", "unipc"):
        error = np.abs(fine[name] - fine["euler"]).mean() / np.abs(fine["euler"]).mean()
        assert error < 0.1, name


def test_ddim_on_a_flow_model_is_euler(emoji):
    a, b = (emoji("a penguin", seed=3, steps=6, solver=s).images for s in ("ddim", "euler"))
    assert np.array_equal(a, b)


def test_the_readme_example_runs_from_the_root(tmp_path):
    import subprocess
    import sys

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    total = Bundle.open("emoji").manifest.defaults.steps
    assert done.stdout.splitlines()[-1] == f"{total - 1} {total} (1, 128, 128, 3)"
