"""The process around the application: what signals do.

SIGTERM or SIGINT: the server drains and ends; once more: at once. SIGHUP: the bundle is loaded
again from where it was named, which may hold another by now.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from gentron.runtime.http_reload import drain

log = logging.getLogger(__name__)
AT_ONCE = 5.0  # seconds that a call under way has after a second signal
HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


class Server(uvicorn.Server):
    def __init__(self, app: FastAPI, host: str, port: int, drain_timeout: float):
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            loop="asyncio",  # these two are what is tested, whatever else is installed
            http="h11",
            log_config=None,  # the program's own, see `server_log.py`
            access_log=False,  # `http_log.py` has the lines, with names and without prompts
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._app, self._seconds = app, drain_timeout
        self._at_once = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._reloading: set[asyncio.Task[Any]] = set()
        self._stops = 0
        self._watch = threading.Timer(AT_ONCE, os._exit, (1,))
        self._watch.daemon = True

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            self._watch.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise them again at the end: that the server was told to end
        is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted: dict[int, Any] = {signal.SIGINT: self.handle_exit, signal.SIGTERM: self.handle_exit}
        if HANGUP is not None:
            wanted[HANGUP] = lambda number, frame: self.reload()
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._stops += 1
        if self._stops > 2:
            os._exit(128 + sig)
        self._loop.call_soon_threadsafe(self._stop)

    def reload(self) -> None:
        """From any thread, or a signal's handler."""
        self._loop.call_soon_threadsafe(self._reload)

    def _stop(self) -> None:
        if not self.started:
            self.should_exit = True
        elif self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            log.warning("ending at once")
            if not self._at_once.is_set():
                self._at_once.set()
                self._watch.start()

    async def _drain(self) -> None:
        served = self._app.state
        try:
            await drain(
                served.gentron, served.reloader, served.metrics, self._seconds, self._at_once
            )
        finally:
            self.should_exit = True

    def _reload(self) -> None:
        if self.started and self._draining is None:
            task = asyncio.create_task(self._app.state.reloader.reload())
            self._reloading.add(task)
            task.add_done_callback(self._reloading.discard)
