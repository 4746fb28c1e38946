"""Samples of one latent shape that share engine calls, whatever their steps, solvers, guidance,
texts or seeds. They join and leave between calls; each has a slot of the state until it leaves.

It knows nothing of guidance, solvers, prompts or devices; those are rows and tables by now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gentron.contract import STATE_SLOTS
from gentron.engines import Buffer, Call, Engine
from gentron.runtime.sample import LatentShape, RowLookup, Rows, Sample, pack
from gentron.runtime.tables import Tables

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 96)  # of a call that is compiled for its shape


@dataclass(frozen=True)
class CallShapes:
    """How many samples and rows a call has for so many that are needed.

    `samples` are the sizes of the state, ascending; the last is the most. `padded` for engines
    that are compiled for each shape: the state always has room for the most, which costs next to
    nothing, and rows, which cost everything, come in the few numbers of `ROWS`, at most
    `most_rows`. So few shapes are met, and each is met again.
    """

    samples: tuple[int, ...]
    padded: bool = False
    most_rows: int = ROWS[-1]

    def slots(self, samples: int) -> int:
        if self.padded:
            return self.samples[-1]
        return next(size for size in self.samples if size >= samples)

    def rows(self, rows: int) -> int:
        if not self.padded:
            return rows
        return max(rows, min(self.most_rows, next(n for n in ROWS if n >= rows)))


@dataclass(eq=False)
class Member:
    """One sample on its way."""

    sample: Sample
    initial: Floats  # [F, C, h, w], its noise
    step: int = 0  # the next to do
    slot: int = -1  # of the state, while it takes part
    bad_step: int | None = None  # the step that was not finite

    @property
    def done(self) -> bool:
        return self.step >= self.sample.steps


class StepBatch:
    """Two state buffers, and the calls between them. One thread may use it."""

    def __init__(
        self,
        engine: Engine,
        tables: Tables,
        lookup: RowLookup,
        shape: LatentShape,
        shapes: CallShapes,
    ):
        """`lookup` finds the rows of samples of this shape in `tables`."""
        self.calls = 0  # of the denoiser engine
        self._engine, self._tables, self._lookup = engine, tables, lookup
        self.shape, self._shapes = shape, shapes
        self._slots: list[Member | None] = []
        self._states: list[Buffer] = []
        self._bad: list[Buffer] = []
        self._noise: Buffer | None = None
        self._input = 0  # which of the two the next call reads
        self._noisy = False
        self._bound: dict[int, tuple[dict[str, Buffer], tuple[Call, Call]]] = {}  # by rows
        self._flags: deque[tuple[Callable[[], Array], list[tuple[Member, int, int]]]] = deque()
        self._small = [s.name for s in engine.component.inputs if s.name in Rows.__annotations__]

    @property
    def members(self) -> list[Member]:
        return [member for member in self._slots if member is not None]

    def join(self, members: Sequence[Member]) -> None:
        """At most as many as `shapes` allow, together with those that are there."""
        wanted = len(self.members) + len(members)
        assert wanted <= self._shapes.samples[-1], (wanted, self._shapes)
        if not members:
            return
        if wanted > len(self._slots):
            self._resize(self._shapes.slots(wanted))
        empty = [slot for slot, member in enumerate(self._slots) if member is None]
        state = np.zeros((1, STATE_SLOTS, *self.shape), np.float32)
        for slot, member in zip(empty, members, strict=False):
            self._slots[slot], member.slot = member, slot
            state[0, 0] = member.initial
            self._states[self._input].write_rows(slot, state)

    def leave(self, members: Sequence[Member]) -> None:
        """They cost nothing any more. Read their latents before."""
        for member in members:
            self._slots[member.slot] = None
            member.slot = -1
        if not self.members:
            self._resize(0)

    def step(self, active: Sequence[Member] | None = None) -> None:
        """One call that does the next step of `active`, of all members by default.

        If it raises, nothing has changed and it may be tried again, with fewer for example.
        """
        self._tables.flush()
        doing = {member.slot for member in self.members if active is None or member in active}
        entries = [
            (member.sample, member.step) if member is not None and slot in doing else None
            for slot, member in enumerate(self._slots)
        ]
        rows = pack(entries, self._lookup, self._shapes.rows)
        call, bad = self._write_rows(rows)
        self._write_noise(entries)
        call.run()
        self.calls += 1
        flags = bad.start_read()  # before the next step is queued
        running = [m for m in self.members if m.slot in doing and not m.done]
        self._flags.append((flags, [(m, m.slot, m.step) for m in running]))
        idle = [m for m in self.members if m not in running]
        if idle and active is not None:
            self._restore(idle, flags())
        for member in running:
            member.step += 1
        self._input = 1 - self._input

    def check(self, *, queued: int = 0) -> list[Member]:
        """Members whose step was not finite, of all calls but the last `queued`."""
        found = []
        while len(self._flags) > queued:
            flags, members = self._flags.popleft()
            values = flags()
            for member, slot, step in members:
                if values[slot] and member.bad_step is None:
                    member.bad_step = step
                    found.append(member)
        return found

    def start_states(self) -> tuple[Callable[[], Floats], Callable[[], Floats]]:
        """States [slots, 3, F, C, h, w] on both sides of the last call, by slot."""
        before, after = self._states[1 - self._input], self._states[self._input]
        return before.start_read(), after.start_read()

    def start_state(self) -> Callable[[], Floats]:
        """The state now, [slots, 3, F, C, h, w]; slot 0 of its second axis are the latents."""
        return self._states[self._input].start_read()

    def _restore(self, idle: Sequence[Member], flags: Array) -> None:
        """A slot without a step weighs the first row with 0, and 0 x NaN is NaN."""
        hurt = [member for member in idle if flags[member.slot]]
        if hurt:
            before = self._states[self._input].read()
            for member in hurt:
                self._states[1 - self._input].write_rows(member.slot, before[member.slot][None])

    def _resize(self, slots: int) -> None:
        """New state buffers; members move to the first slots, with what they have. Changes nothing
        if there is no memory for them."""
        members = self.members
        shape = (slots, STATE_SLOTS, *self.shape)
        states, bad, noise = self._states, self._bad, self._noise
        if slots:
            states = [self._engine.buffer(name, shape) for name in ("state", "next_state")]
            bad = [self._engine.buffer("bad", (slots,)) for _ in range(2)]
            noise = self._engine.buffer("noise", (slots, *self.shape))
            if members:
                held = self._states[self._input].read()
                state = np.zeros(shape, np.float32)
                state[: len(members)] = held[[member.slot for member in members]]
                states[0].write(state)
        else:
            states, bad, noise = [], [], None
        self._states, self._bad, self._noise = states, bad, noise
        self._slots = [*members, *[None] * (slots - len(members))]
        for slot, member in enumerate(members):
            member.slot = slot
        self._bound, self._input, self._noisy = {}, 0, False

    def _write_rows(self, rows: Rows) -> tuple[Call, Buffer]:
        """Writes the small inputs; binds on the first sight of a row count, then never again."""
        count = len(rows.row_sample)
        if count not in self._bound:
            small = {
                name: self._engine.buffer(name, getattr(rows, name).shape) for name in self._small
            }
            assert self._noise is not None
            fixed = {**small, **self._tables.buffers, "noise": self._noise}
            calls = [
                self._engine.bind(
                    {**fixed, "state": self._states[i], "next_state": self._states[1 - i],
                     "bad": self._bad[i]}
                )
                for i in range(2)
            ]  # fmt: skip
            self._bound[count] = (small, (calls[0], calls[1]))
        small, pair = self._bound[count]
        for name in self._small:
            small[name].write(getattr(rows, name))
        return pair[self._input], self._bad[self._input]

    def _write_noise(self, entries: Sequence[tuple[Sample, int] | None]) -> None:
        """Fresh noise for stochastic samples, and zeros once after them."""
        drawn = {
            slot: entry[0].noise(entry[1], self.shape)
            for slot, entry in enumerate(entries)
            if entry is not None and entry[0].needs_noise(entry[1])
        }
        if not drawn and not self._noisy:
            return
        assert self._noise is not None
        noise = np.zeros((len(self._slots), *self.shape), np.float32)
        for slot, values in drawn.items():
            noise[slot] = values
        self._noise.write(noise)
        self._noisy = bool(drawn)
