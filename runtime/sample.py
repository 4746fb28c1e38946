"""One sample's way through the loop, and the packing of many samples into one engine call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gentron.contract import MAX_BRANCHES, STATE_SLOTS, UPDATE_TERMS
from gentron.guidance import Branch, guidance_branches
from gentron.noise import INITIAL, normal
from gentron.runtime.text import EncodedText
from gentron.solvers import SolverTable

LatentShape = tuple[int, int, int, int]  # (F, C, h, w)
UNGUIDED = guidance_branches(1.0, 1.0, moving=True)  # equation 6 with both scales 1: one row


@dataclass(frozen=True)
class Sample:
    """Everything a sample needs, as values: nothing of it is shared with any other request."""

    table: SolverTable
    branches: tuple[Branch, ...]
    prompt: EncodedText
    negative: EncodedText
    seed: int
    unguided: frozenset[int] = frozenset()  # steps that run the prompt's branch alone

    @property
    def steps(self) -> int:
        return len(self.table.timesteps)

    def branches_at(self, step: int) -> tuple[Branch, ...]:
        return UNGUIDED if step in self.unguided else self.branches

    def text_of(self, branch: Branch) -> EncodedText:
        return self.prompt if branch.text else self.negative

    def initial_noise(self, shape: LatentShape) -> npt.NDArray[np.float32]:
        noise = normal(self.seed, INITIAL, shape[0], shape[1:])
        return noise * np.float32(self.table.initial_scale)

    def needs_noise(self, step: int) -> bool:
        return step < self.steps and bool(self.table.uses_noise[step])

    def noise(self, step: int, shape: LatentShape) -> npt.NDArray[np.float32]:
        return normal(self.seed, step + 1, shape[0], shape[1:])


@dataclass(frozen=True)
class Rows:
    """The small per-step inputs of the denoiser: which rows there are and what becomes of them."""

    row_sample: npt.NDArray[np.int64]  # [R]
    row_modulation: npt.NDArray[np.int64]  # [R]
    row_text: npt.NDArray[np.int64]  # [R]
    row_motion_free: npt.NDArray[np.bool_]  # [R]
    slots: npt.NDArray[np.int64]  # [B, 3]
    guidance: npt.NDArray[np.float32]  # [B, 3]
    update: npt.NDArray[np.float32]  # [B, 3, 5]


class Conditioning:
    """Row numbers of the conditioning tables: texts by prompt, modulation by (text, timestep).

    A model without pooled text shares its modulation rows between texts.
    """

    def __init__(self, samples: Sequence[Sample], *, pooled: bool):
        self.pooled = pooled
        self.texts: list[EncodedText] = []
        self.modulation: list[tuple[EncodedText, float]] = []
        self._text_row: dict[str, int] = {}
        self._modulation_row: dict[tuple[str | None, float], int] = {}
        for sample in samples:
            used = [
                {text.prompt: text for text in map(sample.text_of, sample.branches_at(step))}
                for step in range(sample.steps)
            ]
            for text in {name: text for texts in used for name, text in texts.items()}.values():
                for step, time in enumerate(map(float, sample.table.timesteps)):
                    if text.prompt in used[step]:
                        self._add(text, time)

    def _add(self, text: EncodedText, time: float) -> None:
        if text.prompt not in self._text_row:
            self._text_row[text.prompt] = len(self.texts)
            self.texts.append(text)
        key = self._key(text, time)
        if key not in self._modulation_row:
            self._modulation_row[key] = len(self.modulation)
            self.modulation.append((text, time))

    def _key(self, text: EncodedText, time: float) -> tuple[str | None, float]:
        return (text.prompt if self.pooled else None), time

    def text_row(self, text: EncodedText) -> int:
        return self._text_row[text.prompt]

    def modulation_row(self, text: EncodedText, time: float) -> int:
        return self._modulation_row[self._key(text, time)]


class RowLookup(Protocol):
    """Where the conditioning of a sample lies in the tables."""

    def text_row(self, text: EncodedText) -> int: ...

    def modulation_row(self, text: EncodedText, time: float) -> int: ...


def pack(
    steps: Sequence[tuple[Sample, int] | None],
    lookup: RowLookup,
    pad_to: Callable[[int], int] = lambda rows: rows,
) -> Rows:
    """The rows of every sample that has a step to do; (sample, step) each in its slot of the state.

    A slot that is None, or whose sample is already done, costs no row: its state passes through
    unchanged. `pad_to` says how many rows the call is to have for so many that are needed; the
    others repeat the first, and nothing reads them.
    """
    row_sample: list[int] = []
    row_modulation: list[int] = []
    row_text: list[int] = []
    row_motion_free: list[bool] = []
    slots = np.zeros((len(steps), MAX_BRANCHES), np.int64)
    guidance = np.zeros((len(steps), MAX_BRANCHES), np.float32)
    update = np.zeros((len(steps), STATE_SLOTS, UPDATE_TERMS), np.float32)
    for index, entry in enumerate(steps):
        if entry is None or entry[1] >= entry[0].steps:
            update[index, range(STATE_SLOTS), range(STATE_SLOTS)] = 1
            continue
        sample, step = entry
        slots[index] = len(row_sample)  # unused slots repeat the first branch, with weight 0
        time = float(sample.table.timesteps[step])
        for slot, branch in enumerate(sample.branches_at(step)):
            text = sample.text_of(branch)
            slots[index, slot] = len(row_sample)
            guidance[index, slot] = branch.weight
            row_sample.append(index)
            row_modulation.append(lookup.modulation_row(text, time))
            row_text.append(lookup.text_row(text))
            row_motion_free.append(not branch.motion)
        update[index] = sample.table.updates[step]
    spare = pad_to(len(row_sample)) - len(row_sample)
    return Rows(
        np.asarray(row_sample + row_sample[:1] * spare, np.int64),
        np.asarray(row_modulation + row_modulation[:1] * spare, np.int64),
        np.asarray(row_text + row_text[:1] * spare, np.int64),
        np.asarray(row_motion_free + row_motion_free[:1] * spare, np.bool_),
        slots,
        guidance,
        update,
    )
