"""What a video model is asked for: forty prompts that depend on the vocabulary and nothing else."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from gentron.errors import RequestError
from gentron.train.clips import FRAMES, MOTIONS, Clip, ClipSampler, held_out_motions
from gentron.train.prompts import category
from gentron.train.scenes import COLORS, article, held_out_color

ROWS = 5  # prompts of each motion
# Things that have a front: whether a ball rotates, nobody can tell.
WITH_A_FRONT = ("land animals", "birds and reptiles", "vehicles")


@dataclass(frozen=True)
class ClipPrompt:
    """One noun, one motion, one background colour."""

    text: str
    noun: str
    motion: str  # a key of MOTIONS
    background: str
    trained: bool  # whether training had clips of this noun with this motion

    @property
    def group(self) -> str:
        return "trained" if self.trained else "unseen"


def clip_prompts(names: Sequence[str]) -> tuple[ClipPrompt, ...]:
    """ROWS rows of one prompt for each motion; half of all pairs of noun and motion were held out.

    Nouns by lot, each once where there are enough; backgrounds that the noun had in training.
    Raises RequestError for a vocabulary in which some motion has no noun to make it.
    """
    r, found, used = random.Random("clips"), [], set()
    for row in range(ROWS):
        for column, motion in enumerate(MOTIONS):
            trained = (row + column) % 2 == 0
            fitting = [n for n in names if (motion not in held_out_motions(n)) == trained]
            if motion == "rotating":
                fitting = [n for n in fitting if category(n) in WITH_A_FRONT] or fitting
            fresh = [n for n in fitting if n not in used]
            if not fitting:
                raise RequestError(
                    "model",
                    f"its {len(names)} nouns have none {'trained' if trained else 'held out'} for "
                    f"{motion!r}; train it with more nouns",
                )
            noun = r.choice(fresh or fitting)
            used.add(noun)
            color = r.choice([c for c in COLORS if c != held_out_color(noun)])
            text = f"{article(noun)} {MOTIONS[motion]} on {article(color)} background"
            found.append(ClipPrompt(text, noun, motion, color, trained))
    return tuple(found)


def select_prompts(prompts: Sequence[ClipPrompt], sample: int | None) -> tuple[ClipPrompt, ...]:
    """At most `sample` of them, spread evenly over both groups and the motions; always the same."""
    if sample is None or sample >= len(prompts):
        return tuple(prompts)
    order = list(range(len(prompts)))
    random.Random("clip sample").shuffle(order)
    halves = [[k for k in order if prompts[k].trained == trained] for trained in (True, False)]
    chosen = halves[0][: -(-sample // 2)] + halves[1][: sample // 2]
    return tuple(prompts[k] for k in sorted(chosen))


def digest(prompts: Sequence[ClipPrompt]) -> str:
    """Sha256 of every text and of what counts as right."""
    return hashlib.sha256(json.dumps([vars(p) for p in prompts]).encode()).hexdigest()


def real_clip(
    prompt: ClipPrompt,
    names: Sequence[str],
    seed: int,
    *,
    frames: int = FRAMES,
    still: bool = False,
) -> Clip:
    """What a perfect clip of the prompt could be, moving as in training; or not at all."""
    sampler = ClipSampler(names, 0, frames=frames)
    sampler.reseed(f"{seed} {prompt.text}")
    motion = None if still else prompt.motion
    return sampler.make(names.index(prompt.noun), motion, prompt.background)
