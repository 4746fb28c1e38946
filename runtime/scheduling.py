"""The one thread that owns the denoiser: at every step it packs what the policy chose into a call.

Text encoders, conditioner and decoder run on two threads of their own, so the steps of other
requests go on meanwhile: what is prepared reaches this thread as rows to write, what is finished
leaves it as latents.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gentron.errors import CancelledError, DeadlineError, NonFiniteError
from gentron.runtime.cost_curve import CostCurve
from gentron.runtime.finite import non_finite_message
from gentron.runtime.observer import Observer
from gentron.runtime.pipeline import Pipeline
from gentron.runtime.policy import Limits, Turns, choose
from gentron.runtime.sample import LatentShape
from gentron.runtime.stages import PictureFilter, Stages
from gentron.runtime.step_batch import ROWS, CallShapes, StepBatch
from gentron.runtime.tables import RowNumbers, Tables
from gentron.runtime.ticket import Progress
from gentron.runtime.work import LEFT, PREPARING, RUNNING, Needs, Work, latents_of

log = logging.getLogger(__name__)
COMPILED = 32  # samples at most where every size of a call has to be compiled
IDLE = 60.0  # seconds between looks at an empty table


@dataclass(frozen=True)
class Capacity:
    """What may be under way at once."""

    samples: int = 32  # of one latent shape
    requests: int = 64
    state_bytes: int = 1 << 30
    table_rows: int = 1024  # modulation rows: one a distinct (text, step)
    texts: int = 64
    all_ride: bool = False  # calls take all that are ready, whatever the cost curve says


class Scheduler:
    """Everything but `submit`, `cancel` and `close` happens on its own thread."""

    def __init__(self, pipeline: Pipeline, capacity: Capacity, observer: Observer):
        self.curve = CostCurve()
        self.error: BaseException | None = None  # that ended the thread
        self._pipeline, self._capacity, self._observer = pipeline, capacity, observer
        engine = pipeline._engines["denoiser"]
        most = engine.largest
        rows = min(capacity.table_rows, most.get("T", capacity.table_rows))
        texts = min(capacity.texts, most.get("U", capacity.texts))
        samples = min(capacity.samples, most.get("B", capacity.samples))
        if pipeline.backend.exact_shapes:
            samples = min(samples, COMPILED)
        self._engine = engine
        self._tables = Tables(pipeline.bundle.config, engine, modulation=rows, texts=texts)
        sizes = tuple(n for n in (1, 2, 4, 8, 16, 32) if n < samples)
        self._shapes = CallShapes(
            (*sizes, samples), pipeline.backend.exact_shapes, min(ROWS[-1], most.get("R", ROWS[-1]))
        )
        self.limits = Limits(
            samples=samples,
            memory=(capacity.state_bytes, rows, texts),
            units=(lambda shape: float("inf")) if capacity.all_ride else self.curve.best_units,
            requests=capacity.requests,
        )
        self.stages = Stages(pipeline, self._tables, observer)
        self._batches: dict[LatentShape, StepBatch] = {}
        self._works: dict[int, Work] = {}
        self._needs: dict[int, Needs] = {}
        self._turns = Turns()
        self._mail: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="gentron-steps", daemon=True)
        self._thread.start()

    def listen(self, on_end: Callable[[Work], None], picture_filter: PictureFilter) -> None:
        self.stages.on_end, self.stages.picture_filter = on_end, picture_filter

    def submit(self, work: Work, needs: Needs) -> None:
        self._post(lambda: self._add(work, needs))

    def cancel(self, work: Work) -> None:
        """From any thread; idempotent. Takes effect before the next step."""
        work.cancelled = True
        self._post(lambda: None)

    def close(self) -> None:
        """Fails what is not finished with CancelledError; idempotent."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        self.stages.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _post(self, change: Callable[[], None]) -> None:
        self._mail.append(change)
        self._wake.set()

    def _run(self) -> None:
        try:
            with self._pipeline._engines.pinned("denoiser"):
                while not self._closing:
                    self._turn()
        except BaseException as error:
            log.exception("the scheduler stopped")
            self.error = error
        finally:
            self._read_mail()
            for work in list(self._works.values()):
                self._drop(work, CancelledError("the service is closing; ask again later"))

    def _turn(self) -> None:
        """One look at the table, and one call if anything is ready."""
        self._wake.clear()
        self._read_mail()
        for work in [w for w in self._works.values() if w.cancelled]:
            self._drop(work, CancelledError("the request was cancelled"))
        now = time.monotonic()
        entries = [work.entry(self._needs[number]) for number, work in self._works.items()]
        choice = choose(entries, self._turns, self.limits, now, self.curve.seconds)
        self._turns = choice.turns
        for number in choice.expired:
            waited = now - self._works[number].arrived
            self._drop(
                self._works[number],
                DeadlineError(f"the deadline passed, {waited:.1f} s after the request came"),
            )
        for number in choice.start:
            self._start(self._works[number], now)
        if choice.step:
            for number, due in choice.due.items():
                self._works[number].due = due
            self._step([self._works[number] for number in choice.step])
        else:
            deadlines = [e.deadline for e in entries if e.deadline is not None]
            self._wake.wait(max(0.0, min(deadlines, default=now + IDLE) - now))

    def _read_mail(self) -> None:
        while self._mail:
            self._mail.popleft()()

    def _add(self, work: Work, needs: Needs) -> None:
        self._works[work.number] = work
        self._needs[work.number] = needs
        self._count()

    def _start(self, work: Work, now: float) -> None:
        work.stage = PREPARING
        self._observer.started(now - work.arrived)
        self._count()
        self.stages.prepare(
            work,
            done=lambda: self._post(lambda: self._join(work)),
            failed=lambda error: self._post(lambda: self._drop(work, error)),
        )

    def _join(self, work: Work) -> None:
        if work.stage == LEFT:  # cancelled meanwhile
            self._release(work)
            return
        batch = self._batch(work)
        try:
            batch.join(work.members)
        except Exception as error:  # no memory for its state, for example: its own failure
            if not batch.members:
                del self._batches[batch.shape]
            self._drop(work, error)
            self._release(work)
            return
        work.stage = RUNNING
        work.on_state("running")

    def _batch(self, work: Work) -> StepBatch:
        shape = work.request.shape
        if shape not in self._batches:
            settings = work.request.settings
            lookup = RowNumbers(
                self._pipeline.bundle.config, self._tables, (settings.height, settings.width)
            )
            self._batches[shape] = StepBatch(
                self._engine, self._tables, lookup, shape, self._shapes
            )
        return self._batches[shape]

    def _step(self, works: Sequence[Work]) -> None:
        batch = self._batch(works[0])
        sizes = {w.number: (w.rows, w.entry(self._needs[w.number]).units) for w in works}
        started = time.perf_counter()
        stepped = self._advance(batch, works, again=True)
        finishing = any(work.members[0].done for work in stepped)
        bad = batch.check(queued=0 if finishing else 1)
        seconds = time.perf_counter() - started
        rows, units = (sum(sizes[work.number][i] for work in stepped) for i in range(2))
        if len(stepped) == len(works):
            self.curve.observe(batch.shape, units, seconds)
        self._observer.stepped(sum(len(w.members) for w in stepped), int(rows), seconds)
        for work in list(self._works.values()):
            for member in work.members:
                if member in bad:
                    self._fail_bad(work, member.bad_step or 0)
                    break
        self._report(batch, [work for work in stepped if work.stage == RUNNING], seconds)

    def _advance(self, batch: StepBatch, works: Sequence[Work], *, again: bool) -> list[Work]:
        """One step of all of them; returns those that took it.

        The state that a call reads stays whole, so a call that raises is tried once more from it,
        then in halves, down to the request that cannot be computed: that one fails.
        """
        try:
            batch.step([member for work in works for member in work.members])
        except Exception as error:
            self._observer.retried()
            for work in works:
                work.context.run(
                    log.warning, "a call for %d requests failed: %s", len(works), error
                )
            if again:
                return self._advance(batch, works, again=False)
            if len(works) == 1:
                self._drop(works[0], error)
                return []
            half = len(works) // 2
            return [
                work
                for part in (works[:half], works[half:])
                for work in self._advance(batch, part, again=False)
            ]
        return list(works)

    def _report(self, batch: StepBatch, works: Sequence[Work], seconds: float) -> None:
        """Progress, previews and results of those that took a step."""
        now = time.monotonic()
        wants = [w for w in works if w.done_steps - 1 in w.previews and not w.members[0].done]
        if wants:
            before, after = (read() for read in batch.start_states())
            for work in wants:
                slots = [member.slot for member in work.members]
                self.stages.preview(work, before[slots], after[slots], seconds)
        finished = [work for work in works if work.members[0].done]
        state = batch.start_state() if finished else None
        for work in works:
            work.denoise_seconds += seconds
            work.calls += 1
            if work.done_steps == 1:
                self._observer.first_step(now - work.arrived)
            work.on_progress(Progress(work.done_steps - 1, work.request.settings.steps, seconds))
        for work in finished:
            assert state is not None
            latents = latents_of(work, state())
            self._leave(work)
            work.on_state("decoding")
            self.stages.decode(work, latents)
        if finished:
            self._count()

    def _fail_bad(self, work: Work, step: int) -> None:
        steps = work.request.settings.steps
        message = non_finite_message(f"denoiser, step {step + 1} of {steps},")
        self._drop(work, NonFiniteError(message))

    def _drop(self, work: Work, error: Exception) -> None:
        """Ends a request that has no result."""
        if work.stage == LEFT:
            self._release(work)
            return
        preparing = work.stage == PREPARING
        self._leave(work, release=not preparing)
        self._count()
        self.stages.fail(work, error)

    def _leave(self, work: Work, *, release: bool = True) -> None:
        """A request that is being prepared gives its rows back when that has ended."""
        if work.stage == RUNNING:
            self._batches[work.request.shape].leave(work.members)
            if not self._batches[work.request.shape].members:
                del self._batches[work.request.shape]
        work.stage = LEFT
        del self._works[work.number], self._needs[work.number]
        if release:
            self._release(work)

    def _release(self, work: Work) -> None:
        if work.lease is not None:
            self._tables.release(work.lease)

    def _count(self) -> None:
        running = sum(work.stage in (PREPARING, RUNNING) for work in self._works.values())
        self._observer.queued(len(self._works) - running, running)
