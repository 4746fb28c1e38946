"""The guided loop of one request: its samples take all steps together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gentron.config import GenTronConfig
from gentron.engines import Engine
from gentron.errors import NonFiniteError
from gentron.runtime.finite import non_finite_message
from gentron.runtime.sample import Conditioning, LatentShape, Sample
from gentron.runtime.step_batch import CallShapes, Member, StepBatch
from gentron.runtime.tables import RowNumbers, Size, Tables, compute


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
        latent_shape: LatentShape,
        size: Size | None = None,
    ):
        """latent_shape is (F, C, h, w); size is (H, W) in pixels, for models conditioned on it.
        Computes the conditioning tables."""
        self.samples, self.shape = list(samples), latent_shape
        self.conditioning = Conditioning(samples, pooled=config.pooled_width > 0)
        self.total = max(sample.steps for sample in samples)
        self.done = 0  # steps finished
        rows = compute(config, engines, self.conditioning, size)
        self.condition_calls = rows.calls  # of the text projection and the conditioner
        engine = engines["denoiser"]  # last: what came before may have been freed for it
        counts = len(self.conditioning.modulation), len(self.conditioning.texts)
        tables = Tables(config, engine, modulation=counts[0], texts=counts[1])
        tables.put(rows)
        self.tables = tables.buffers  # the conditioning, by tensor name
        self._batch = StepBatch(
            engine,
            tables,
            RowNumbers(config, tables, size),
            latent_shape,
            CallShapes((len(samples),)),
        )
        self._members = [Member(sample, sample.initial_noise(self.shape)) for sample in samples]
        self._batch.join(self._members)

    def run(self) -> Iterator[LoopStep]:
        """One item per step. A non-finite step is noticed while the next one runs."""
        for step in range(self.total):
            started = time.perf_counter()
            self._batch.step()
            self.done = step + 1
            bad = self._batch.check(queued=1 if step < self.total - 1 else 0)
            if bad:
                raise self._non_finite(bad[0])
            yield LoopStep(step, self.total, time.perf_counter() - started)

    @property
    def calls(self) -> int:
        """Of the denoiser engine."""
        return self._batch.calls

    def latents(self) -> npt.NDArray[np.float32]:
        """Current latents of every sample, [B, F, C, h, w]."""
        state: npt.NDArray[np.float32] = self._batch.start_state()()
        return state[:, 0]

    def before_and_after(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """States [B, 3, F, C, h, w] on both sides of the last step, for previews."""
        assert self.done
        before, after = self._batch.start_states()
        return before(), after()

    def _non_finite(self, member: Member) -> NonFiniteError:
        assert member.bad_step is not None
        index = self._members.index(member)
        return NonFiniteError(
            non_finite_message(
                f"denoiser, step {member.bad_step + 1} of {self.total}, sample {index},"
            )
        )
