"""What does a picture show? A template scorer over a vocabulary, on any of the named colours.

It has seen the font's renderings and nothing else, so it cannot favour a model. Position and size
do not matter to it: what differs from the border's colour is cut out, scaled to one small tile of
length one and compared with every noun's tile on that same colour, at a few offsets and scales.
The small tile and the length were chosen on blurred and bent renderings, which they forgive best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron.train.scenes import COLORS, SPRITE_SIDE

TILE = 8  # pixels: coarse enough to forgive a soft or crooked picture
FINE = 8  # samples to a tile's pixel and axis
BORDER = 2  # pixels
FAINT, SOLID = 0.06, 0.2  # distance from the background: below is background, above is ink
LEAST_INK = 2  # pixels of ink that make a row or column part of the object
OFFSETS = (-0.06, 0.0, 0.06)  # of the cut-out, in its own sides' halves
SCALES = (0.94, 1.0, 1.06)
TURNS = 36  # angles at which a turned object is looked at
GAP_PLACES = torch.linspace(0.42, 0.58, 21)  # of the width: where two objects may part
GAP_SLOPES = torch.linspace(-1.2, 1.2, 7)  # columns to a row, of the line between them
INK_SIDE = 116 / 128  # a sprite's longest side, of the side it is placed with
NOTHING = float("inf")  # distance of every noun from an empty picture


class Sighting(NamedTuple):
    """What the scorer sees of one object."""

    background: str
    distances: Tensor  # [K], of each noun of the vocabulary, smaller is nearer
    size: float  # as `Placement.size`; 0 for an empty picture
    x: float = 0.5  # centre of the ink, of the picture's sides
    y: float = 0.5

    @property
    def is_empty(self) -> bool:
        return self.size == 0

    def ranks(self) -> Tensor:
        """Places of the nouns, 0 for the first choice. An empty picture puts every noun last."""
        if self.is_empty:
            return torch.full((len(self.distances),), len(self.distances))
        return self.distances.argsort(stable=True).argsort()

    def first_choice(self, names: Sequence[str]) -> str:
        """The nearest noun of the vocabulary; `nothing` for an empty picture."""
        return "nothing" if self.is_empty else names[int(self.distances.argmin())]


class Rank(NamedTuple):
    """One noun asked for, one picture seen."""

    asked: str
    rank: int  # of the asked noun, 0 = first choice
    choice: str


class TemplateScorer:
    """`sprites` [K, 4, 128, 128] as `load_sprites` gives them, one for each name."""

    def __init__(self, sprites: Tensor, names: Sequence[str]):
        self.names = list(names)
        self.sprites = sprites
        self._templates: dict[str, Tensor] = {}  # by colour, made when first needed

    def look(self, picture: Tensor) -> Sighting:
        """The one object of a picture [3, H, W] in [0, 1]."""
        background, difference = ground(picture)
        return self._compare(background, difference)

    def look_turned(self, picture: Tensor) -> Sighting:
        """The one object of a picture, whichever way it is turned: every noun at its best angle."""
        background, difference = ground(picture)
        box = ink_box(difference)
        if box is None:
            return self._compare(background, difference)
        turned = turned_about(difference, box, TURNS)
        boxes = torch.stack([box if (b := ink_box(d)) is None else b for d in turned])
        distances = torch.cdist(_unit(cut_tiles(turned, boxes)), self._of_color(background))
        best = distances.min(1).values.argmin()
        closer = self._compare(background, turned[best]).distances
        nearest = torch.minimum(distances.min(0).values, closer)
        return Sighting(background, nearest, float(box[2]) / INK_SIDE)

    def look_at_pair(self, picture: Tensor) -> tuple[Sighting, Sighting]:
        """The left and the right object, parted where both halves look most like something."""
        background, difference = ground(picture)
        parts = [(difference * left, difference * ~left) for left in gaps(difference)]
        doubts = [sum(self._doubt(background, half) for half in halves) for halves in parts]
        left, right = parts[doubts.index(min(doubts))]
        return self._compare(background, left), self._compare(background, right)

    def _doubt(self, background: str, difference: Tensor) -> float:
        """Distance of the nearest noun, by the plain cut-out alone."""
        box = ink_box(difference)
        if box is None:
            return NOTHING
        tiles = cut_tiles(difference[None], box[None])
        return float(torch.cdist(_unit(tiles), self._of_color(background)).min())

    def judge(self, picture: Tensor, asked: str) -> Rank:
        """Where one noun ranks for the one object of a picture."""
        sighting = self.look(picture)
        rank = int(sighting.ranks()[self.names.index(asked)])
        return Rank(asked, rank, sighting.first_choice(self.names))

    def _compare(self, background: str, difference: Tensor) -> Sighting:
        box = ink_box(difference)
        if box is None:
            return Sighting(background, torch.full((len(self.names),), NOTHING), 0.0)
        tried = torch.stack(
            [box * scale + shift for scale in _scaled() for shift in _shifts(float(box[2]))]
        )
        tiles = cut_tiles(difference.expand(len(tried), -1, -1, -1), tried)
        distances = torch.cdist(_unit(tiles), self._of_color(background)).min(0).values
        x, y, side = box.tolist()
        return Sighting(background, distances, side / INK_SIDE, x, y)

    def _of_color(self, name: str) -> Tensor:
        """Tiles of every noun on this colour, cut out as a picture's are: [K, 3 * TILE * TILE]."""
        if name not in self._templates:
            color = torch.tensor(COLORS[name]).float()[:, None, None] / 255
            rgb, alpha = self.sprites[:, :3], self.sprites[:, 3:]
            difference = rgb - alpha * color  # the sprite on the colour, less the colour
            whole = torch.tensor([0.0, 0.0, 1.0])
            boxes = torch.stack([whole if (b := ink_box(d)) is None else b for d in difference])
            self._templates[name] = _unit(cut_tiles(difference, boxes))
        return self._templates[name]


def _unit(tiles: Tensor) -> Tensor:
    """Tiles as rows of length one: a pale picture is no nearer to the pale nouns than to others."""
    return F.normalize(tiles.flatten(1), dim=1)


def _scaled() -> list[Tensor]:
    return [torch.tensor([1.0, 1.0, scale]) for scale in SCALES]


def _shifts(side: float) -> list[Tensor]:
    return [torch.tensor([x * side, y * side, 0.0]) for y in OFFSETS for x in OFFSETS]


def ground(picture: Tensor) -> tuple[str, Tensor]:
    """The background's name, and the picture less its colour: [3, 128, 128].

    Every pixel of the border votes for the named colour nearest to it; the colour itself is the
    median of the winner's pixels, so that an object that touches the border does not matter.
    """
    if picture.shape[1:] != (SPRITE_SIDE, SPRITE_SIDE):
        size = (SPRITE_SIDE, SPRITE_SIDE)
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    inside = torch.zeros(picture.shape[1:], dtype=torch.bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    border = picture[:, ~inside].T
    named = torch.tensor(list(COLORS.values())).float() / 255
    votes = torch.cdist(border, named).argmin(1)
    winner = int(votes.bincount(minlength=len(named)).argmax())
    color = border[votes == winner].median(0).values
    return list(COLORS)[winner], picture - color[:, None, None]


def ink(difference: Tensor) -> Tensor:
    """How surely each pixel is not background, 0 to 1: [..., H, W]."""
    distance = difference.abs().amax(-3)
    return ((distance - FAINT) / (SOLID - FAINT)).clamp(0, 1)


def ink_box(difference: Tensor) -> Tensor | None:
    """The square around the ink: (centre x, centre y, side), each 0 to 1; None if there is none."""
    solid = ink(difference) > 0.5
    rows = (solid.sum(1) >= LEAST_INK).nonzero()
    columns = (solid.sum(0) >= LEAST_INK).nonzero()
    if not len(rows) or not len(columns):
        return None
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = torch.maximum(bottom - top, right - left)
    return torch.cat([(left + right) / 2, (top + bottom) / 2, side]) / difference.shape[-1]


def gaps(difference: Tensor) -> Tensor:
    """Ways to part two objects: the pixels left of a straight line, [slopes, H, W].

    For each slope the line that crosses least ink, near the middle if in doubt.
    """
    height, width = difference.shape[-2:]
    y = (torch.arange(height) + 0.5) / height - 0.5
    x = GAP_PLACES[:, None] + GAP_SLOPES[:, None, None] * y  # [slopes, places, H]
    columns = (x * width).long().clamp(0, width - 1)
    lines = columns.flatten(0, 1)
    crossed = ink(difference).expand(len(lines), -1, -1).gather(2, lines[:, :, None]).sum((1, 2))
    doubt = (GAP_PLACES - 0.5).abs()  # worth less than a pixel of ink
    best = (crossed.view(columns.shape[:2]) + doubt).argmin(1)
    chosen = columns[torch.arange(len(columns)), best]
    return torch.arange(width) < chosen[:, :, None]


def cut_tiles(difference: Tensor, boxes: Tensor, *, pixels: int = TILE, fine: int = FINE) -> Tensor:
    """Squares [N, 3] = (centre x, centre y, side) out of [N, 3, H, W]: [N, 3, pixels, pixels].

    Beyond the picture there is background, which is zero.
    """
    x, y, side = boxes.T
    zero = torch.zeros_like(side)
    rows = [torch.stack([side, zero, 2 * x - 1], 1), torch.stack([zero, side, 2 * y - 1], 1)]
    shape = [len(boxes), 3, pixels * fine, pixels * fine]
    grid = F.affine_grid(torch.stack(rows, 1), shape, align_corners=False)
    return F.avg_pool2d(F.grid_sample(difference, grid, align_corners=False), fine)


def turned_about(difference: Tensor, box: Tensor, turns: int) -> Tensor:
    """A difference [3, H, W] turned by `turns` equal parts of a circle about a box's centre, as
    far as it stays inside: [turns, 3, H, W], the first as it is."""
    angle = torch.arange(turns) * 2 * math.pi / turns
    x, y = 2 * box[0] - 1, 2 * box[1] - 1
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos, -sin, x - cos * x + sin * y], 1),
        torch.stack([sin, cos, y - sin * x - cos * y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [turns, *difference.shape], align_corners=False)
    return F.grid_sample(difference.expand(turns, -1, -1, -1), grid, align_corners=False)
