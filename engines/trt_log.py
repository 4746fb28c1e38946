"""What TensorRT says, kept for the error that follows: its calls fail without raising."""

from __future__ import annotations

import logging
import re
import threading
import weakref
from collections import deque
from typing import Any, TypeVar

from gentron.errors import BackendError

log = logging.getLogger(__name__)

KEPT = 20  # messages of each kind
SHOWN = 3  # errors in an exception
LONGEST = 400  # characters of one of them
ERROR, WARNING = 1, 2  # ILogger.Severity: 0 and 1 are errors, then warnings, information, details

LAYER = (
    re.compile(r"implementation for node (.+?)(?: due to|\.(?:\s|$)|\s\[|$)"),
    re.compile(r"operation '([^']+)'"),
    re.compile(r"(?:^|[\s(])(?:layer|node):? '?([\w./:{}\[\]-]+?)'?(?:[\s,;:.)]|$)", re.IGNORECASE),
)
NO_KERNEL = re.compile(r"could not find any implementation for node", re.IGNORECASE)
# Said after every failure on a machine without a driver, whatever the cause.
CONSEQUENCE = re.compile(r"cudaError 35|CUDA driver version is insufficient")

Value = TypeVar("Value")


class Messages:
    """The last errors and warnings of a process from when `logger_for` was given this. Written by
    any thread of TensorRT."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=KEPT)
        self.warnings: deque[str] = deque(maxlen=KEPT)

    def add(self, severity: int, text: str) -> None:
        line = _line(text)
        if severity <= ERROR:
            self.errors.append(line)
        elif severity == WARNING and line not in self.warnings:
            self.warnings.append(line)

    def last_errors(self) -> list[str]:
        """Those that say why."""
        errors = list(self.errors)
        causes = [line for line in errors if not CONSEQUENCE.search(line)]
        return [_short(line) for line in (causes or errors)[-SHOWN:]]

    def layer(self) -> str:
        """The layer that the errors name, if they name one."""
        for line in list(self.errors):
            for pattern in LAYER:
                if found := pattern.search(line):
                    return found[1]
        return ""


class _Audience:
    """Who hears what one library says: every `Messages` that is still in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # not taken in `tell`, which must wait for nobody
        self._listeners: tuple[weakref.ref[Messages], ...] = ()

    def join(self, messages: Messages) -> None:
        with self._lock:
            living = [listener for listener in self._listeners if listener() is not None]
            self._listeners = (*living, weakref.ref(messages))

    def tell(self, severity: int, text: str) -> None:
        """Passes everything on to `logging` as well, where nothing is louder than information:
        errors reach the user in the exception, warnings in the facts of the build."""
        for listener in self._listeners:
            if (messages := listener()) is not None:
                messages.add(severity, text)
        log.log(logging.INFO if severity <= WARNING else logging.DEBUG, _line(text))


_loggers: dict[type, tuple[_Audience, Any]] = {}
_loggers_lock = threading.Lock()


def logger_for(trt: Any, messages: Messages) -> Any:
    """The one ILogger of that module in this process; from now on it adds to `messages` too.

    There is only one because TensorRT keeps the first that it is given and warns of every other,
    while it holds the lock that a builder or runtime takes as it ends. A warning runs Python: if
    that collects an old builder, or lets a thread run that drops one, it waits for this lock, and
    nothing ever goes on.
    """
    with _loggers_lock:
        if trt.ILogger not in _loggers:
            audience = _Audience()
            _loggers[trt.ILogger] = (audience, _make_logger(trt, audience))
        audience, logger = _loggers[trt.ILogger]
    audience.join(messages)
    return logger


def _make_logger(trt: Any, audience: _Audience) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # of a module that is chosen at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            audience.tell(int(severity), text)

    return Logger()


def failure(
    messages: Messages, component: str, what: str, *, profiles: str = "", workspace: int = 0
) -> BackendError:
    """One line: component, what failed, at which layer, what TensorRT said, what to change."""
    layer, errors = messages.layer(), messages.last_errors()
    said = "; ".join(errors) or "without saying why"
    if any(NO_KERNEL.search(line) for line in errors):
        return BackendError(
            f"{component}: no kernel for {layer} (profile {profiles}; {workspace / 1e9:.1f} GB of "
            "workspace): allow more workspace with GENTRON_WORKSPACE_BYTES, or narrow the profile; "
            f"TensorRT said: {said}"
        )
    where = f" at {layer}" if layer else ""
    return BackendError(f"{component}: {what} failed{where}: {said}")


def require(value: Value | None, what: str, messages: Messages, component: str,
            **context: Any) -> Value:  # fmt: skip
    """`value`, unless it is one that TensorRT returns for a failure: None, False or -1.

    Raises BackendError as `failure` words it.
    """
    # 0 is the first profile's index, and equal to False.
    if value is None or value is False or (type(value) is int and value == -1):
        raise failure(messages, component, what, **context)
    return value


def _line(text: str) -> str:
    return " ".join(text.split())


def _short(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
