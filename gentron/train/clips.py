"""Captioned clips of emoji that move: the training data of the video model, drawn on the fly."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gentron.train.scenes import COLORS, Placement, Scene, article, draw, held_out_color
from gentron.train.wording import Namer, Wording

FRAMES = 8  # section 4.1
# What a caption says of the motion.
MOTIONS = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "rotating": "rotating",
    "growing": "growing",
    "shrinking": "shrinking",
    "bouncing": "bouncing",
}
# What a clip shows that is run backwards.
OPPOSITES = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "growing": "shrinking",
    "shrinking": "growing",
}
STILL = "standing still"
STILL_SHARE = 0.08
HELD_OUT = 2  # motions of each noun that no caption of it has
TURN = 0.25  # of a full turn clockwise, for what rotates
TURN_SHARE = 2.0  # clips that rotate for one of any other motion: every noun has to be seen askew
TRAVEL = (0.28, 0.45)  # of the picture's side, from the first frame to the last


@dataclass(frozen=True)
class Clip:
    frames: tuple[Scene, ...]
    caption: str
    noun: int
    motion: str | None
    background: str


def held_out_motions(noun: str) -> frozenset[str]:
    """Motions that this noun never makes in training: kept for judging unseen pairs."""
    generator = random.Random(zlib.crc32(f"motion {noun}".encode()))
    return frozenset(generator.sample(list(MOTIONS), HELD_OUT))


def backwards(clip: Clip, name: str) -> Clip | None:
    """The clip from its last frame to its first, and what that shows; None if that is no motion
    of its own, or one that this noun, called `name`, never makes in training."""
    if clip.motion not in OPPOSITES:
        return None
    motion = OPPOSITES[clip.motion]
    if motion in held_out_motions(name):
        return None
    subject, _, rest = clip.caption.rpartition(f" {MOTIONS[clip.motion]}")
    caption = f"{subject} {MOTIONS[motion]}{rest}"
    frames = tuple(replace(scene, caption=caption) for scene in clip.frames[::-1])
    return replace(clip, frames=frames, caption=caption, motion=motion)


def draw_clip(clip: Clip, sprites: torch.Tensor) -> torch.Tensor:
    """Frames in [-1, 1], float32 [F, 3, 128, 128]."""
    return draw(clip.frames, sprites)


class ClipSampler:
    """Draws clips from a seeded stream; `known` is what else captions may call the nouns."""

    def __init__(
        self,
        names: Sequence[str],
        seed: int,
        *,
        frames: int = FRAMES,
        known: Mapping[str, Wording] | None = None,
    ):
        self.names, self.frames = list(names), frames
        self.random, self.namer = random.Random(seed), Namer(known or {}, seed)

    def reseed(self, seed: str) -> None:
        self.random.seed(seed)
        self.namer.reseed(seed)

    def sample(self, count: int) -> list[Clip]:
        return [self.one() for _ in range(count)]

    def one(self) -> Clip:
        r = self.random
        noun = r.randrange(len(self.names))
        name = self.names[noun]
        motion = None
        if r.random() >= STILL_SHARE:
            made = [m for m in MOTIONS if m not in held_out_motions(name)]
            shares = [TURN_SHARE if m == "rotating" else 1.0 for m in made]
            motion = r.choices(made, shares)[0]
        background = "white"
        if r.random() >= 0.3:
            background = r.choice([c for c in COLORS if c != held_out_color(name)])
        return self.make(noun, motion, background)

    def make(self, noun: int, motion: str | None, background: str) -> Clip:
        """A clip of one noun, motion (or none) and background; paths and sizes by lot."""
        r, count = self.random, self.frames
        doing = MOTIONS[motion] if motion else STILL
        subject = f"{article(self.namer.name(self.names[noun]))} {doing}"
        caption = subject
        if background != "white" or r.random() < 0.3:
            form = r.choice(("{} on {a} background", "{}, {} background", "{} on {}"))
            caption = form.format(subject, background, a=article(background))
        path = _path(r, motion, count)
        frames = tuple(
            Scene((Placement(noun, size, x, y, angle),), background, caption)
            for size, x, y, angle in path
        )
        return Clip(frames, caption, noun, motion, background)


def _path(r: random.Random, motion: str | None, count: int) -> list[tuple[float, ...]]:
    """(size, x, y, angle in radians) of every frame; at constant speed unless it bounces.

    A caption says which way everything goes: of a turn either way, or a bounce from any height, the
    mean is a thing that stands still, and that is what a small model learns.
    """
    shares = [k / max(1, count - 1) for k in range(count)]  # 0 to 1
    size, travel = r.uniform(0.45, 0.62), r.uniform(*TRAVEL)
    slack = (1 - size) / 2
    x, y = (0.5 + r.uniform(-0.5, 0.5) * slack for _ in range(2))
    near, far = 0.5 - travel / 2, 0.5 + travel / 2
    if motion in ("left", "right"):
        start, end = (near, far) if motion == "right" else (far, near)
        return [(size, start + (end - start) * s, y, 0.0) for s in shares]
    if motion in ("up", "down"):
        start, end = (near, far) if motion == "down" else (far, near)
        return [(size, x, start + (end - start) * s, 0.0) for s in shares]
    if motion == "rotating":
        turn = 2 * math.pi * TURN
        return [(size, x, y, turn * s) for s in shares]
    if motion in ("growing", "shrinking"):
        small, large = r.uniform(0.3, 0.4), r.uniform(0.75, 0.95)
        start, end = (small, large) if motion == "growing" else (large, small)
        return [(start + (end - start) * s, 0.5, 0.5, 0.0) for s in shares]
    if motion == "bouncing":
        floor, height = 1 - size / 2 - 0.04, r.uniform(0.25, 0.4)
        return [(size, x, floor - height * 4 * s * (1 - s), 0.0) for s in shares]
    return [(size, x, y, 0.0) for _ in shares]
