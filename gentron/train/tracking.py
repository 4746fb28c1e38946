"""How does the object of a clip move? Its ink is followed from frame to frame; nothing is learned.

The centre of the ink says where it is, its area how large it looks, and the turn between two frames
is the angle at which the earlier cut-out, scaled to the size of the later one, is most like it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron.train.clips import TRAVEL, TURN
from gentron.train.scorer import cut_tiles, ground, ink

STILL, NOTHING = "standing still", "nothing"
LEAST_AREA = 40  # pixels of ink in 128 x 128 that are an object
ANGLES = 48  # tried for a turn
PATCH = 32  # pixels of a cut-out's side
REACH = 2.0  # radius of a cut-out, in root mean square distances of the ink from its centre
ALIKE = 0.5  # a turn counts where the turned cut-out is at least this much like the next
BETTER = 0.05  # and by this much more than the cut-out that was not turned
STRAIGHT = 0.5  # of the way made, what must remain between start and end; less is bouncing
ONE_WAY = 0.75  # of all turning, what must go one way
# What is called a motion: half the least that captions promise in training (gentron.train.clips).
LEAST = {
    "travel": TRAVEL[0] / 2,  # of the picture's side
    "bounce": 0.25 / 2,  # of the picture's side, between highest and lowest
    "growth": math.log(0.75 / 0.4) / 2,  # log of the ratio of sizes
    "turn": 2 * math.pi * TURN / 2,  # radians
}


class Track(NamedTuple):
    """Of the frames that show anything, in order."""

    x: Tensor  # [K] centre of the ink, of the picture's side from the left
    y: Tensor  # [K] from the top
    size: Tensor  # [K] square root of the ink's area, of the picture's side
    turn: Tensor  # [K - 1] radians clockwise from one frame to the next
    alike: Tensor  # [K - 1] cosine of neighbouring cut-outs, as they are
    alike_turned: Tensor  # [K - 1] with the earlier one turned by `turn`
    of: int  # frames in all


class Motion(NamedTuple):
    """What a track shows."""

    name: str  # a key of MOTIONS, STILL or NOTHING
    strength: float  # in units of the least that counts
    across: float  # from the first frame to the last, of the picture's side, to the right
    down: float
    bounce: float  # between highest and lowest frame, of the picture's side
    growth: float  # size of the last frame by that of the first
    turn: float  # degrees clockwise, all frames together


def track(frames: Tensor) -> Track:
    """Follows the object of a clip [F, 3, H, W] in [0, 1]."""
    places, cuts = [], []
    for frame in frames:
        difference = ground(frame)[1]
        weight = ink(difference)
        if float(weight.sum()) < LEAST_AREA:
            continue
        x, y, radius = _centre(weight)
        places.append(torch.stack([x, y, weight.sum().sqrt() / len(weight)]))
        cuts.append(_turned(difference, x, y, radius))
    if not places:
        empty = torch.zeros(0)
        return Track(empty, empty, empty, empty, empty, empty, len(frames))
    x, y, size = torch.stack(places, 1)
    turns, alike, turned = [], [], []
    for before, after in pairwise(cuts):
        likeness = before @ after[0]  # [ANGLES]
        best = int(likeness.argmax())
        if likeness[best] < max(ALIKE, float(likeness[0]) + BETTER):
            best = 0
        turns.append(math.remainder(best * 2 * math.pi / ANGLES, 2 * math.pi))
        alike.append(likeness[0])
        turned.append(likeness[best])
    values = (torch.tensor([float(v) for v in part]) for part in (turns, alike, turned))
    return Track(x, y, size, *values, len(frames))


def motion_of(path: Track) -> Motion:
    """The one motion that a track shows most clearly, if any."""
    if len(path.x) < max(2, path.of // 2):
        return Motion(NOTHING, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    across, down = (float(axis[-1] - axis[0]) for axis in (path.x, path.y))
    bounce = float(path.y.max() - path.y.min())
    growth = float((path.size[-1] / path.size[0]).log())
    turn = _steady_turn(path.turn)
    strengths = {
        "right" if across > 0 else "left": _straight(path.x) / LEAST["travel"],
        "down" if down > 0 else "up": _straight(path.y) / LEAST["travel"],
        "bouncing": 0.0 if _straight(path.y) else bounce / LEAST["bounce"],
        "growing" if growth > 0 else "shrinking": abs(growth) / LEAST["growth"],
        "rotating": abs(turn) / LEAST["turn"],
    }
    name = max(strengths, key=lambda key: strengths[key])
    strength = strengths[name]
    if strength < 1:
        name = STILL
    return Motion(name, strength, across, down, bounce, math.exp(growth), math.degrees(turn))


def steadiness(path: Track, *, turning: bool) -> float:
    """How alike neighbouring frames' cut-outs are, 0 to 1, wherever they are in the picture; of
    something that was asked to turn, after turning them back."""
    values = path.alike_turned if turning else path.alike
    return float(values.clamp(min=0).mean()) if len(values) else 0.0


def _steady_turn(turns: Tensor) -> float:
    """All turns together; 0 unless most pairs of frames turn, and the same way."""
    total = float(turns.sum())
    same = turns[turns.sign() == turns.sum().sign()]
    if len(same) <= len(turns) / 2 or abs(total) < ONE_WAY * float(turns.abs().sum()):
        return 0.0
    return total


def _straight(axis: Tensor) -> float:
    """Distance between start and end; 0 for a way that turns back."""
    net, way = float((axis[-1] - axis[0]).abs()), float(axis.diff().abs().sum())
    return net if net >= STRAIGHT * way else 0.0


def _centre(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre (x, y) of the ink and its root mean square distance from there, of the side."""
    side = len(weight)
    place = (torch.arange(side) + 0.5) / side
    total = weight.sum()
    x = (weight.sum(0) * place).sum() / total
    y = (weight.sum(1) * place).sum() / total
    spread = weight.sum(0) * (place - x) ** 2, weight.sum(1) * (place - y) ** 2
    return x, y, (sum(part.sum() for part in spread) / total).sqrt()


def _turned(difference: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """A round cut-out at every angle, less its mean colour, length one: rows [ANGLES, ...]."""
    (square,) = cut_tiles(
        difference[None], torch.stack([x, y, 2 * REACH * radius])[None], pixels=PATCH, fine=2
    )
    angle = torch.arange(ANGLES) * 2 * math.pi / ANGLES
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(ANGLES)
    # From the turned picture's coordinates to the cut-out's: clockwise, as y points down.
    rows = torch.stack([torch.stack([cos, sin, zero], 1), torch.stack([-sin, cos, zero], 1)], 1)
    grid = F.affine_grid(rows, [ANGLES, 3, PATCH, PATCH], align_corners=False)
    turned = F.grid_sample(square.expand(ANGLES, -1, -1, -1), grid, align_corners=False)
    axis = (torch.arange(PATCH) + 0.5) / PATCH * 2 - 1
    inside = turned[:, :, axis[:, None] ** 2 + axis**2 <= 1]  # [ANGLES, 3, pixels of the disc]
    return F.normalize((inside - inside.mean(2, keepdim=True)).flatten(1), dim=1)
