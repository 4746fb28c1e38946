"""A request in the service, as its caller sees it: steps as they come, then the result."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gentron.errors import CancelledError
from gentron.runtime.result import Result, Settings

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """One finished step. `preview` [B, H, W, 3] is there where it was asked for."""

    index: int  # 0-based
    total: int
    seconds: float  # of the call that the step was part of
    preview: npt.NDArray[np.uint8] | None = None


class Ticket:
    """Iterate it for progress, await `result()`; `cancel()` at any time.

    A caller that is slower than the steps gets the latest one and does not hold anything up; no
    preview is lost. All methods belong to the event loop that it was made in.
    """

    def __init__(self, id: str, settings: Settings):
        self.id, self.settings = id, settings
        self.state = "queued"  # then running, decoding; completed, failed or cancelled
        self.done_steps = 0
        self._loop = asyncio.get_running_loop()
        self._news, self._started = asyncio.Event(), asyncio.Event()
        self._latest: Progress | None = None
        self._previews: deque[Progress] = deque()
        self._result: asyncio.Future[Result] = self._loop.create_future()
        self._result.add_done_callback(_retrieve)
        self.on_cancel: Callable[[], None] = lambda: None

    async def __aiter__(self) -> AsyncIterator[Progress]:
        while True:
            if self._previews:
                yield self._previews.popleft()
            elif self._latest is not None:
                latest, self._latest = self._latest, None
                yield latest
            elif self._result.done():
                if not self._result.cancelled() and (error := self._result.exception()):
                    raise error
                return
            else:
                self._news.clear()
                await self._news.wait()

    async def started(self) -> None:
        """Returns when it has left the queue, or has ended."""
        await self._started.wait()

    async def result(self) -> Result:
        """Raises what the request failed with: RequestError, NonFiniteError, DeadlineError,
        ResourceError, RefusedError, CancelledError."""
        return await asyncio.shield(self._result)

    @property
    def finished(self) -> bool:
        return self._result.done()

    def cancel(self) -> None:
        """Idempotent; takes effect before the next step."""
        if not self._result.done():
            self.on_cancel()
            self._finish("cancelled", CancelledError("the request was cancelled"))

    async def __aenter__(self) -> Ticket:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaving early cancels."""
        self.cancel()

    def post(self, change: Callable[[Ticket], None]) -> None:
        """From any thread: what happened, to be taken note of in the event loop."""
        try:
            self._loop.call_soon_threadsafe(change, self)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.info("request %s: its event loop has gone", self.id)
            self.on_cancel()

    def advance(self, progress: Progress) -> None:
        if self._result.done():
            return
        self._started.set()
        if progress.preview is not None:
            self._previews.append(progress)
        else:
            self._latest, self.state = progress, "running"
            self.done_steps = progress.index + 1
        self._news.set()

    def move(self, state: str) -> None:
        if not self._result.done():
            self.state = state
            self._started.set()

    def complete(self, result: Result) -> None:
        if not self._result.done():
            self.state = "completed"
            self._result.set_result(result)
            self._started.set()
            self._news.set()

    def fail(self, error: Exception) -> None:
        self._finish("cancelled" if isinstance(error, CancelledError) else "failed", error)

    def _finish(self, state: str, error: Exception) -> None:
        if not self._result.done():
            self.state = state
            self._result.set_exception(error)
            self._started.set()
            self._news.set()


def _retrieve(future: asyncio.Future[Result]) -> None:
    """An error that nobody asks for is no defect: the client has gone."""
    if not future.cancelled():
        future.exception()
