"""Many requests at once on one bundle, batched by step: for a server, ours or your own.

async with Service(Pipeline.load("emoji")) as service:
    ticket = service.submit("a red apple", seed=1)
    async for step in ticket:
        print(step.index + 1, step.total)
    picture = (await ticket.result()).images[0]
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from gentron.errors import CancelledError, RefusedError
from gentron.runtime.admission import Admission, Bounds
from gentron.runtime.cost_curve import CostCurve
from gentron.runtime.observer import Observer
from gentron.runtime.pipeline import Pipeline
from gentron.runtime.policy import Limits
from gentron.runtime.request import Request
from gentron.runtime.result import Settings
from gentron.runtime.scheduling import Capacity, Scheduler
from gentron.runtime.stages import PictureFilter
from gentron.runtime.ticket import Ticket
from gentron.runtime.tracing import start_trace
from gentron.runtime.work import Needs, Work

PromptFilter = Callable[[str], str | None]  # a prompt or negative prompt -> why not


@dataclass(frozen=True)
class Filters:
    """Hooks that may refuse: each returns a reason, or None to let it pass. The picture's runs on
    the decoding thread and may take its time; the prompt's runs in the event loop."""

    prompt: PromptFilter = lambda text: None
    picture: PictureFilter = lambda pictures: None


@dataclass(frozen=True)
class Options:
    """Whom to tell, and how much is taken on."""

    bounds: Bounds = field(default_factory=Bounds)
    capacity: Capacity = field(default_factory=Capacity)
    filters: Filters = field(default_factory=Filters)
    observer: Observer = field(default_factory=Observer)


class Computes(Protocol):
    """Who does the work that the service has taken on: this machine's scheduler, or others."""

    limits: Limits
    curve: CostCurve

    def listen(self, on_end: Callable[[Work], None], picture_filter: PictureFilter) -> None:
        """`on_end` is called once for every work, before its caller hears of it."""

    def submit(self, work: Work, needs: Needs) -> None: ...

    def cancel(self, work: Work) -> None: ...

    def close(self) -> None: ...

    @property
    def alive(self) -> bool: ...


class Service:
    """Runs while it is open; the pipeline is the caller's to close, afterwards.

    `submit` belongs to an event loop's thread. The steps run on a thread of their own, so the
    event loop is never held up.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: Options | None = None,
        *,
        owns: bool = False,
        scheduler: Computes | None = None,
    ):
        """With `owns`, closing it closes the pipeline as well. A `scheduler` is closed with it."""
        self.pipeline, self.options, self._owns = pipeline, options or Options(), owns
        self.scheduler: Computes = scheduler or Scheduler(
            pipeline, self.options.capacity, self.options.observer
        )
        self.admission = Admission(self.options.bounds, self.scheduler.limits, self.scheduler.curve)
        self.scheduler.listen(
            lambda work: self.admission.give_back(work.number), self.options.filters.picture
        )
        self._numbers = itertools.count(1)
        self._prefix = secrets.token_hex(4)  # ids are not met again after a restart
        self._closed = False

    def submit(
        self,
        prompt: str | Settings,
        *,
        client: str = "",
        priority: int = 0,
        deadline: float | None = None,
        previews: Iterable[int] = (),
        **options: Any,
    ) -> Ticket:
        """Takes a request on, or raises at once.

        Settings as for `Pipeline.stream`. `client` is whom it is done for: clients get equal
        shares. `priority` -2 to 2, each twice the share of the one before; `deadline` in seconds
        from now; `previews` are steps (0-based) after which a picture is wanted. Raises
        RequestError for one that cannot be done, BusyError, DeadlineError, RefusedError.
        """
        if self._closed:
            raise CancelledError("the service is closed")
        settings = (
            prompt if isinstance(prompt, Settings) else self.pipeline.settings(prompt, **options)
        )
        request = Request.of(self.pipeline.bundle, settings)
        needs, wanted = Needs.of(request, self.pipeline.bundle.config), frozenset(previews)
        self.admission.check(request, needs, len(wanted), priority)
        for text in (settings.prompt, settings.negative):
            if reason := self.options.filters.prompt(text):
                raise RefusedError(f"the prompt was refused: {reason}")
        number, now = next(self._numbers), time.monotonic()
        due = None if deadline is None else now + deadline
        self.admission.take(number, request, needs, client, now, due)
        ticket = Ticket(f"{self._prefix}-{number}", settings)
        work = Work(
            number=number,
            request=request,
            client=client,
            priority=priority,
            deadline=due,
            previews=wanted,
            on_progress=lambda progress: ticket.post(lambda t: t.advance(progress)),
            on_state=lambda state: ticket.post(lambda t: t.move(state)),
            on_result=lambda result: ticket.post(lambda t: t.complete(result)),
            on_error=lambda error: ticket.post(lambda t: t.fail(error)),
            trace=start_trace(settings),
        )
        ticket.on_cancel = lambda: self.scheduler.cancel(work)
        self.scheduler.submit(work, needs)
        return ticket

    async def warm_up(self, sizes: Iterable[tuple[int, int]] = ()) -> None:
        """Draws what was declared once, so that no request meets an engine's first call: each of
        `sizes` in pixels, the bundle's own by default, alone and as many as share a call. Measures
        what calls take on the way."""
        bounds, compiled = self.options.bounds, self.pipeline.backend.exact_shapes
        most = min(self.scheduler.limits.samples, bounds.requests, bounds.per_client)
        for size in list(sizes) or [self.pipeline.bundle.native_size]:
            for count in (1, 2, 4, 8, 16, 32):
                if count > most or not (await self._draw_together(count, size) or compiled):
                    break

    async def _draw_together(self, count: int, size: tuple[int, int]) -> bool:
        """Returns whether larger calls may still pay."""
        steps = 4
        tickets = [
            self.submit("warm up", seed=k, steps=steps, size=size, client="warm-up")
            for k in range(count)
        ]
        await asyncio.gather(*(ticket.result() for ticket in tickets))
        shape = Request.of(self.pipeline.bundle, tickets[0].settings).shape
        return self.scheduler.curve.best_units(shape) == float("inf")

    @property
    def healthy(self) -> bool:
        return self.scheduler.alive and not self._closed

    async def close(self) -> None:
        """Ends what is under way with CancelledError; idempotent."""
        self._closed = True
        await asyncio.to_thread(self.scheduler.close)
        if self._owns:
            await asyncio.to_thread(self.pipeline.close)

    async def idle(self) -> None:
        """Returns once everything that was taken on has ended."""
        while self.admission.taken:
            await asyncio.sleep(0.05)

    async def __aenter__(self) -> Service:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
