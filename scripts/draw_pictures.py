"""Draws the pictures of the README and of the model card from the packaged bundle.

Nothing is picked: the prompts watched in training with seed 0, and 36 nouns of a seeded shuffle.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image

from gentron.runtime import Pipeline
from gentron.train.recipe import WATCHED

ROOT = Path(__file__).resolve().parent.parent


def grid(pictures: list[np.ndarray], columns: int) -> Image.Image:
    rows = [np.concatenate(pictures[i : i + columns], axis=1)
            for i in range(0, len(pictures), columns)]  # fmt: skip
    return Image.fromarray(np.concatenate(rows, axis=0))


def main() -> None:
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    with Pipeline.load("emoji") as pipe:
        drawn = [pipe(prompt, seed=0).images[0] for prompt in WATCHED]
        grid(drawn, 8).save(folder / "emoji.png")
        names = (pipe.path / "nouns.txt").read_text("utf-8").split("\n")[:-1]
        random.Random(0).shuffle(names)
        drawn = [pipe(name, seed=0).images[0] for name in names[:36]]
        grid(drawn, 6).save(folder / "emoji-random.png")
    print("\n".join(names[:36]))


if __name__ == "__main__":
    main()
