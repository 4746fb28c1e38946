"""Another bundle in place of the one that is served, and the end of a server, with nobody dropped.

Both are the same: new requests go elsewhere (to the new service, or are refused), and what is under
way ends where it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from gentron.errors import GenTronError
from gentron.runtime.http_state import ServerState
from gentron.runtime.metrics import Metrics
from gentron.runtime.service import Service

log = logging.getLogger(__name__)
Size = tuple[int, int]
TO_ANSWER = 5.0  # seconds for the answers of what was cancelled


class Reloader:
    """Belongs to the server's event loop."""

    def __init__(
        self,
        state: ServerState,
        open_service: Callable[[], Service],
        warm_up: Iterable[Size],
        metrics: Metrics,
    ):
        self._state, self._open, self._metrics = state, open_service, metrics
        self._warm_up = list(warm_up)
        self._retired: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()

    async def reload(self) -> bool:
        """Loads and warms a service beside the one that is served, then puts it in its place; what
        the old one has taken on ends there. If anything goes wrong the old one stays, and the log
        says what; returns whether the new one serves."""
        async with self._lock:
            new = None
            try:
                new = await asyncio.to_thread(self._open)
                await new.warm_up(self._warm_up)
            except (GenTronError, MemoryError) as error:
                log.error(
                    "reload failed, the bundle stays as it was: %s", str(error) or "no memory"
                )
            except Exception:
                log.exception("reload failed, the bundle stays as it was")
            else:
                if not self._state.gate.draining:
                    self._replace_by(new)
                    return True
                log.error("reload: the server ends, so the bundle stays as it was")
            self._metrics.reloaded("failed")
            if new is not None:
                await new.close()
            return False

    def _replace_by(self, new: Service) -> None:
        """Between two requests: nothing is awaited here."""
        state = self._state
        old, state.service = state.service, new
        state.runner.use(new)
        bundle = new.pipeline.bundle
        self._metrics.reloaded("completed")
        self._metrics.serves(bundle.manifest.name, bundle.digest)
        log.info("reloaded: %s (%s) serves; %d requests end on the one before",
                 bundle.manifest.name, bundle.digest[:12], old.admission.taken)  # fmt: skip
        task = asyncio.create_task(self._retire(old))
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

    async def _retire(self, old: Service) -> None:
        try:
            await old.idle()
        finally:  # also when the server ends meanwhile
            await old.close()

    @property
    def busy(self) -> bool:
        return bool(self._retired) or self._state.service.admission.taken > 0

    async def close(self) -> None:
        """Ends what is under way on services that were replaced."""
        for task in self._retired:
            task.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)


async def drain(
    state: ServerState, reloader: Reloader, metrics: Metrics, seconds: float, at_once: asyncio.Event
) -> None:
    """Takes no more work, and returns when what is under way has ended; after so many seconds, or
    when `at_once` is set, it is cancelled. Jobs that the store keeps go on at the next start."""
    state.ready, state.gate.draining = False, True
    state.runner.begin_no_more()
    metrics.draining()
    log.info("ending: %d requests are under way and have %g s; a second signal ends them at once",
             state.service.admission.taken, seconds)  # fmt: skip
    end = time.monotonic() + seconds
    while reloader.busy or state.gate.answering:
        if at_once.is_set() or time.monotonic() > end:
            break
        await asyncio.sleep(0.05)
    if left := state.service.admission.taken:
        log.warning("%d requests did not end in time and are cancelled", left)
    await state.runner.close()
    await reloader.close()
    await state.service.close()
    end = time.monotonic() + TO_ANSWER
    while state.gate.answering and time.monotonic() < end and not at_once.is_set():
        await asyncio.sleep(0.02)
