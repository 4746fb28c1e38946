"""The guided loop: S engine calls between two state buffers, everything else already in place.

It knows nothing of guidance, solvers, prompts or devices; those are rows and tables by now.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gentron.config import GenTronConfig
from gentron.contract import STATE_SLOTS
from gentron.engines import Buffer, Call, Engine
from gentron.errors import NonFiniteError
from gentron.runtime.finite import check_finite, non_finite_message
from gentron.runtime.sample import Conditioning, Rows, Sample, pack

Tables = dict[str, npt.NDArray[np.generic]]
MODULATION_CHUNK = 64  # rows per conditioner call: bounds its memory at about 64 MB for G/2


@dataclass(frozen=True)
class LoopStep:
    index: int  # 0-based
    total: int
    seconds: float


class DenoiseLoop:
    """Samples of one latent shape, whatever their steps, solvers, guidance, texts or seeds."""

    def __init__(
        self,
        config: GenTronConfig,
        engines: Mapping[str, Engine],
        samples: Sequence[Sample],
        latent_shape: tuple[int, int, int, int],
        size: tuple[int, int] | None = None,
    ):
        """latent_shape is (F, C, h, w); size is (H, W) in pixels, for models conditioned on it.
        Computes the conditioning tables."""
        self.samples, self.shape, self._size = list(samples), latent_shape, size
        self.conditioning = Conditioning(samples, pooled=config.pooled_width > 0)
        self.total = max(sample.steps for sample in samples)
        self.calls = 0  # of the denoiser engine
        self.condition_calls = 0  # of the text projection and the conditioner
        self.done = 0  # steps finished
        tables = self._condition(config, engines)
        self._engine = engines["denoiser"]  # last: what came before may have been freed for it
        self._tables = self._write_tables(tables)
        state = (len(samples), STATE_SLOTS, *latent_shape)
        self._states = [self._engine.buffer(name, state) for name in ("state", "next_state")]
        self._bad = [self._engine.buffer("bad", (len(samples),)) for _ in range(2)]
        self._noise = self._engine.buffer("noise", (len(samples), *latent_shape))
        self._bound: dict[int, tuple[dict[str, Buffer], tuple[Call, Call]]] = {}
        self._states[0].write(self._initial_state(state))

    def run(self) -> Iterator[LoopStep]:
        """One item per step. A non-finite step is noticed while the next one runs."""
        noisy, flags = False, deque[Callable[[], npt.NDArray[np.generic]]]()
        for step in range(self.total):
            started = time.perf_counter()
            calls = self._write_rows(pack(self.samples, step, self.conditioning))
            noisy = self._write_noise(step, noisy)
            calls[step % 2].run()
            flags.append(self._bad[step % 2].start_read())  # before the next step is queued
            self.calls += 1
            self.done = step + 1
            if step:
                self._check(step - 1, flags.popleft())
            if step == self.total - 1:
                self._check(step, flags.popleft())
            yield LoopStep(step, self.total, time.perf_counter() - started)

    def latents(self) -> npt.NDArray[np.float32]:
        """Current latents of every sample, [B, F, C, h, w]."""
        return self._states[self.done % 2].read()[:, 0]

    def before_and_after(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """States [B, 3, F, C, h, w] on both sides of the last step, for previews."""
        assert self.done
        return self._states[(self.done - 1) % 2].read(), self._states[self.done % 2].read()

    def _condition(self, config: GenTronConfig, engines: Mapping[str, Engine]) -> Tables:
        tables: Tables = {}
        if "text_projection" in engines:
            feeds: dict[str, npt.NDArray[np.generic]] = {}
            for i in range(len(config.text)):
                feeds[f"hidden_{i + 1}"] = np.stack([t.hidden[i] for t in self.conditioning.texts])
                feeds[f"mask_{i + 1}"] = np.stack([t.mask[i] for t in self.conditioning.texts])
            tables |= engines["text_projection"].run(feeds)
            self.condition_calls += 1
        chunks: list[dict[str, npt.NDArray[np.generic]]] = []
        rows = self.conditioning.modulation
        for start in range(0, len(rows), MODULATION_CHUNK):
            part = rows[start : start + MODULATION_CHUNK]
            feeds = {"timesteps": np.asarray([time for _, time in part], np.float32)}
            if config.pooled_width:
                feeds["pooled"] = np.stack([_pooled(text.pooled) for text, _ in part])
            if config.size_conditioning:
                assert self._size is not None
                feeds["size"] = np.tile(np.asarray(self._size, np.float32), (len(part), 1))
            chunks.append(engines["conditioner"].run(feeds))
            self.condition_calls += 1
        return tables | {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}

    def _write_tables(self, tables: Tables) -> dict[str, Buffer]:
        buffers = {}
        for name, values in tables.items():
            source = "text_projection" if name.startswith("text_") else "conditioner"
            check_finite(values, source)
            buffers[name] = self._engine.buffer(name, values.shape)
            buffers[name].write(values)
        return buffers

    def _initial_state(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        state = np.zeros(shape, np.float32)
        for index, sample in enumerate(self.samples):
            state[index, 0] = sample.initial_noise(self.shape)
        return state

    def _write_noise(self, step: int, noisy: bool) -> bool:
        """Fresh noise for stochastic samples; returns whether the buffer now holds any."""
        drawn = {i: sample.noise(step, self.shape) for i, sample in enumerate(self.samples)
                 if sample.needs_noise(step)}  # fmt: skip
        if not drawn and not noisy:
            return False
        noise = np.zeros((len(self.samples), *self.shape), np.float32)
        for index, values in drawn.items():
            noise[index] = values
        self._noise.write(noise)
        return bool(drawn)

    def _write_rows(self, rows: Rows) -> tuple[Call, Call]:
        """Writes the small inputs and returns the calls for even and odd steps.

        Binds on the first sight of a row count, then never again.
        """
        count = len(rows.row_sample)
        names = [s.name for s in self._engine.component.inputs if hasattr(rows, s.name)]
        if count not in self._bound:
            small = {name: self._engine.buffer(name, getattr(rows, name).shape) for name in names}
            fixed = {**small, **self._tables, "noise": self._noise}
            forward = {"state": self._states[0], "next_state": self._states[1]}
            backward = {"state": self._states[1], "next_state": self._states[0]}
            self._bound[count] = (
                small,
                (
                    self._engine.bind({**fixed, **forward, "bad": self._bad[0]}),
                    self._engine.bind({**fixed, **backward, "bad": self._bad[1]}),
                ),
            )
        small, calls = self._bound[count]
        for name in names:
            small[name].write(getattr(rows, name))
        return calls

    def _check(self, step: int, read: Callable[[], npt.NDArray[np.generic]]) -> None:
        bad = read()
        if bad.any():
            raise NonFiniteError(
                non_finite_message(f"denoiser, step {step + 1} of {self.total}, "
                                   f"sample {int(bad.argmax())},")
            )  # fmt: skip


def _pooled(values: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    assert values is not None
    return values
