"""One request inside the scheduler."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gentron.config import GenTronConfig
from gentron.runtime.policy import Entry
from gentron.runtime.request import Request
from gentron.runtime.result import Result, StageReport, resident_mib
from gentron.runtime.sample import Conditioning
from gentron.runtime.step_batch import Member
from gentron.runtime.tables import Lease
from gentron.runtime.ticket import Progress
from gentron.runtime.tracing import Trace

STATE_COPIES = 2 * 3 + 1  # two states of three slots, and the noise
WAITING, PREPARING, RUNNING, LEFT = "waiting", "preparing", "running", "left"


@dataclass(eq=False)
class Work:
    """Where a request stands. Only the scheduler's own thread changes `stage`."""

    number: int
    request: Request
    client: str
    priority: int
    deadline: float | None  # on time.monotonic's clock
    previews: frozenset[int]  # steps after which one was asked for, 0-based
    on_progress: Callable[[Progress], None]
    on_state: Callable[[str], None]
    on_result: Callable[[Result], None]
    on_error: Callable[[Exception], None]
    arrived: float = field(default_factory=time.monotonic)
    stage: str = WAITING
    cancelled: bool = False  # set from any thread
    to_preview: deque[Callable[[], None]] = field(default_factory=deque)  # what it waits for
    due: float | None = None
    members: list[Member] = field(default_factory=list)
    lease: Lease | None = None
    warnings: list[str] = field(default_factory=list)
    reports: list[StageReport] = field(default_factory=list)
    denoise_seconds: float = 0.0
    calls: int = 0
    trace: Trace = field(default_factory=Trace)
    context: Context = field(default_factory=copy_context)  # the caller's: names for log lines

    @property
    def done_steps(self) -> int:
        return self.members[0].step if self.members else 0

    @property
    def rows(self) -> int:
        """Of its next step."""
        return self.request.settings.batch * len(self.request.branches_at(self.done_steps))

    def entry(self, needs: Needs) -> Entry:
        """As the policy sees it."""
        return Entry(
            id=self.number,
            client=self.client,
            shape=self.request.shape,
            samples=self.request.settings.batch,
            units=needs.units * self.rows / needs.rows,
            steps_left=self.request.settings.steps - self.done_steps,
            arrived=self.arrived,
            memory=needs.memory,
            priority=self.priority,
            deadline=self.deadline,
            started=self.stage in (PREPARING, RUNNING),
            ready=self.stage == RUNNING,
            due=self.due,
        )

    def report(self, stage: str, seconds: float, calls: int) -> None:
        self.trace.stage(stage, seconds, calls)
        self.reports.append(StageReport(stage, seconds, resident_mib(), calls))


@dataclass(frozen=True)
class Needs:
    """What a request takes, known before it starts."""

    units: float  # of work a guided step: tokens x frames x rows
    rows: int
    memory: tuple[int, ...]  # bytes of state, modulation rows, texts

    @classmethod
    def of(cls, request: Request, config: GenTronConfig) -> Needs:
        frames, channels, height, width = request.shape
        batch, branches = request.settings.batch, request.branches
        rows = batch * len(branches)
        texts = len(set(request.prompts))
        modulation = request.settings.steps * (texts if config.pooled_width else 1)
        state = batch * STATE_COPIES * frames * channels * height * width * 4
        tokens = height * width // config.patch**2
        return cls(float(tokens * frames * rows), rows, (state, modulation, texts))


def conditioning_of(work: Work, config: GenTronConfig) -> Conditioning:
    samples = [member.sample for member in work.members]
    return Conditioning(samples, pooled=config.pooled_width > 0)


def latents_of(work: Work, state: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[B, F, C, h, w] from a state [slots, 3, F, C, h, w]."""
    return state[[member.slot for member in work.members], 0]
