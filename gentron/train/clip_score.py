"""Does a video model film what it was asked for? Forty prompts, judged frame by frame and as films.

The evaluator also sees clips whose answer is known: real renderings that move as asked (what it
gets right), those through the model's own autoencoder (the best that any denoiser could reach),
real renderings that stand still, noise, and clips of another prompt (what is had for free).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gentron.train.clip_prompts import ClipPrompt, real_clip
from gentron.train.clips import draw_clip
from gentron.train.scenes import SPRITE_SIDE
from gentron.train.scorer import Sighting, TemplateScorer
from gentron.train.tracking import Motion, motion_of, steadiness, track

OTHER_PROMPT = "other prompt's"
GROUPS = ("trained", "unseen")
SHARES = ("object", "background", "motion")  # the first two of frames, the last of clips

Filmer = Callable[[Sequence[ClipPrompt]], Iterable[Tensor]]  # clips [F, 3, H, W] in [0, 1]
Watch = Callable[[int, int], None]  # clips done, of


@dataclass(frozen=True)
class Sight:
    """What the evaluator sees of one clip, whatever it was asked for."""

    frames: tuple[Sighting, ...]  # upright
    turned: tuple[Sighting, ...]  # at any angle; empty unless the clip was asked to turn
    motion: Motion
    steady: float
    steady_turned: float
    places: tuple[tuple[float, float], ...]  # centres of the ink, of frames that show any


@dataclass(frozen=True)
class ClipVerdict:
    """One clip held against its prompt."""

    prompt: ClipPrompt
    saw: tuple[str, ...]  # first choice in each frame
    objects: tuple[bool, ...]  # the noun asked for is the first choice
    backgrounds: tuple[bool, ...]
    distance: float  # of the noun asked for, mean over frames; smaller is clearer
    size: float  # as `Placement.size`, mean over frames
    off_centre: float  # distance of the object's centre from the picture's, mean over frames
    motion: Motion
    steady: float

    @property
    def moves(self) -> bool:
        """As asked."""
        return self.motion.name == self.prompt.motion

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what was asked, what was seen, what of it is right."""
        motion = {k: round(v, 3) if isinstance(v, float) else v
                  for k, v in self.motion._asdict().items()}  # fmt: skip
        return {
            "prompt": self.prompt.text,
            "noun": self.prompt.noun,
            "motion": self.prompt.motion,
            "background": self.prompt.background,
            "trained": self.prompt.trained,
            "saw": self.saw,
            "object_right": self.objects,
            "background_right": self.backgrounds,
            "saw_motion": motion,
            "motion_right": self.moves,
            "distance": round(self.distance, 3),
            "size": round(self.size, 3),
            "off_centre": round(self.off_centre, 3),
            "steadiness": round(self.steady, 3),
        }


def look(scorer: TemplateScorer, prompt: ClipPrompt, clip: Tensor) -> Sight:
    """Looks at every frame, upright and (where turning was asked for) at any angle, and follows
    the object."""
    path = track(clip)
    turns = prompt.motion == "rotating"
    return Sight(
        frames=tuple(scorer.look(frame) for frame in clip),
        turned=tuple(scorer.look_turned(frame) for frame in clip) if turns else (),
        motion=motion_of(path),
        steady=steadiness(path, turning=False),
        steady_turned=steadiness(path, turning=True),
        places=tuple(zip(path.x.tolist(), path.y.tolist(), strict=True)),
    )


def judge(names: Sequence[str], prompt: ClipPrompt, sight: Sight) -> ClipVerdict:
    """Holds what was seen against what was asked for."""
    frames = sight.turned or sight.frames
    row = names.index(prompt.noun)
    distances = [min(2.0, float(frame.distances[row])) for frame in frames]  # 2 is opposite
    saw = tuple(frame.first_choice(names) for frame in frames)
    away = [math.hypot(x - 0.5, y - 0.5) for x, y in sight.places]
    return ClipVerdict(
        prompt=prompt,
        saw=saw,
        objects=tuple(seen == prompt.noun for seen in saw),
        backgrounds=tuple(frame.background == prompt.background for frame in frames),
        distance=_mean(distances),
        size=_mean([frame.size for frame in frames]),
        off_centre=_mean(away),
        motion=sight.motion,
        steady=sight.steady_turned if sight.turned else sight.steady,
    )


def judge_clips(
    scorer: TemplateScorer,
    prompts: Sequence[ClipPrompt],
    filmer: Filmer,
    watch: Watch = lambda done, of: None,
) -> tuple[tuple[ClipVerdict, ...], tuple[Sight, ...]]:
    """Every prompt's clip, and what was seen in it."""
    sights = []
    for prompt, clip in zip(prompts, filmer(prompts), strict=True):
        sights.append(look(scorer, prompt, clip))
        watch(len(sights), len(prompts))
    pairs = zip(prompts, sights, strict=True)
    return tuple(judge(scorer.names, p, sight) for p, sight in pairs), tuple(sights)


def judge_others(
    names: Sequence[str], prompts: Sequence[ClipPrompt], sights: Sequence[Sight]
) -> tuple[ClipVerdict, ...]:
    """Clips held against the prompt of another: an odd number further on, so that a motion never
    meets itself where prompts are laid out in rows of an even number of motions."""
    step = len(sights) // 2 | 1
    moved = [sights[(k + step) % len(sights)] for k in range(len(sights))]
    return tuple(judge(names, p, sight) for p, sight in zip(prompts, moved, strict=True))


def summary(verdicts: Sequence[ClipVerdict]) -> dict[str, Any]:
    """Shares of frames and clips in all and by group, by motion, and means over all clips."""
    groups = {"all": list(verdicts)} | {
        group: [v for v in verdicts if v.prompt.group == group] for group in GROUPS
    }
    motions = dict.fromkeys(v.prompt.motion for v in verdicts)
    of_motion = {m: [v for v in verdicts if v.prompt.motion == m] for m in motions}
    return {
        "groups": {name: _shares(group) for name, group in groups.items() if group},
        "motions": {name: _shares(group) for name, group in of_motion.items()},
        "distance": round(_mean([v.distance for v in verdicts]), 4),
        "steadiness": round(_mean([v.steady for v in verdicts]), 4),
        "size": round(_mean([v.size for v in verdicts]), 4),
        "off_centre": round(_mean([v.off_centre for v in verdicts]), 4),
        "strength": round(_mean([v.motion.strength for v in verdicts]), 3),
    }


def _shares(verdicts: Sequence[ClipVerdict]) -> dict[str, Any]:
    return {
        "clips": len(verdicts),
        "object": _mean([float(right) for v in verdicts for right in v.objects]),
        "background": _mean([float(right) for v in verdicts for right in v.backgrounds]),
        "motion": _mean([float(v.moves) for v in verdicts]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def real(sprites: Tensor, names: Sequence[str], seed: int, frames: int, *, still: bool) -> Filmer:
    """True clips of what the prompts ask for; or the same things, standing still."""

    def render(prompts: Sequence[ClipPrompt]) -> Iterator[Tensor]:
        for prompt in prompts:
            clip = real_clip(prompt, names, seed, frames=frames, still=still)
            yield (draw_clip(clip, sprites) + 1) / 2

    return render


def reconstructed(filmer: Filmer, autoencoder: nn.Module) -> Filmer:
    """The same clips, every frame encoded and decoded again."""

    def rebuild(prompts: Sequence[ClipPrompt]) -> Iterator[Tensor]:
        for clip in filmer(prompts):
            with torch.inference_mode():
                latents = autoencoder.encode(clip * 2 - 1, return_dict=False)[0]
                pixels = autoencoder.decode(latents, return_dict=False)[0]
            yield (pixels.clamp(-1, 1) + 1) / 2

    return rebuild


def noise(seed: int, frames: int) -> Filmer:
    """Clips of nothing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (frames, 3, SPRITE_SIDE, SPRITE_SIDE)
    return lambda prompts: (torch.rand(shape, generator=generator) for _ in prompts)
