"""Does a picture show the noun that was asked for? A template scorer over the whole vocabulary.

It has seen the font's renderings and nothing else, so it cannot favour the model. Position and
size do not matter to it: what differs from white is cut out and scaled to one tile.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron.train.scenes import Placement, Scene, draw

TILE = 24  # pixels
INK = 0.9  # a pixel whose darkest channel is below this is not background


class Verdict(NamedTuple):
    """What the scorer saw in one picture."""

    asked: str
    rank: int  # of the asked noun, 0 = first choice
    choice: str


@dataclass(frozen=True)
class Score:
    first: float  # share of pictures whose first choice is the noun asked for
    first_five: float
    verdicts: tuple[Verdict, ...]


class TemplateScorer:
    def __init__(self, sprites: Tensor, names: Sequence[str]):
        self.names = list(names)
        self.templates = torch.stack([tile(sprite[:3] + 1 - sprite[3:]) for sprite in sprites])

    def judge(self, picture: Tensor, asked: str) -> Verdict:
        """picture [3, H, W] in [0, 1] on a white background."""
        distance = (self.templates - tile(picture)).flatten(1).norm(dim=1)
        order = distance.argsort().tolist()
        rank = order.index(self.names.index(asked))
        return Verdict(asked, rank, self.names[order[0]])

    def score(self, pictures: Callable[[str], Tensor]) -> Score:
        """Asks for every noun once."""
        verdicts = tuple(self.judge(pictures(name), name) for name in self.names)
        count = len(verdicts)
        return Score(
            sum(v.rank == 0 for v in verdicts) / count,
            sum(v.rank < 5 for v in verdicts) / count,
            verdicts,
        )


def tile(picture: Tensor) -> Tensor:
    """What is not white, cut out and scaled: [3, TILE, TILE]."""
    ink = (picture.min(0).values < INK).nonzero()
    if len(ink) == 0:
        return torch.ones(3, TILE, TILE)
    (top, left), (bottom, right) = ink.min(0).values, ink.max(0).values + 1
    return F.interpolate(picture[None, :, top:bottom, left:right], (TILE, TILE), mode="area")[0]


def renderings(sprites: Tensor, names: Sequence[str], seed: int) -> Callable[[str], Tensor]:
    """Real pictures of nouns at sizes and places the templates were not made at."""

    def render(name: str) -> Tensor:
        place = random.Random(f"{seed} {name}")
        size = place.uniform(0.6, 0.95)
        slack = (1 - size) / 2
        x, y = (0.5 + place.uniform(-slack, slack) for _ in range(2))
        scene = Scene((Placement(names.index(name), size, x, y),), "white", name)
        return (draw([scene], sprites)[0] + 1) / 2

    return render


def noise(seed: int) -> Callable[[str], Tensor]:
    """Pictures of nothing: what the scorer gives away for free."""
    generator = torch.Generator().manual_seed(seed)
    return lambda name: torch.rand(3, 128, 128, generator=generator)
