"""How the server logs: one line an event, as JSON or for a person. The library only ever asks
`logging.getLogger`; this is for a program that is a server and nothing else.

What a client sent can be in a line (a path, a model's name): in JSON it is escaped as JSON does,
for a person control characters are written as escapes, so no line can be forged and no terminal
steered.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog
from structlog.types import EventDict, Processor

from gentron.errors import escaped

Format = Literal["console", "json"]
FIELDS = {"method", "path", "status", "seconds", "client", "prompt", "negative"}


def configure(form: Format, level: int = logging.INFO) -> None:
    """Everything that this process logs, ours and that of libraries, to standard error."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(FIELDS),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                # Tracebacks without local variables: those hold prompts and keys.
                structlog.processors.format_exc_info,
                *_rendered(form),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def _rendered(form: Format) -> list[Processor]:
    if form == "json":
        return [structlog.processors.JSONRenderer()]
    return [
        _harmless,
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
    ]


def _harmless(_: Any, __: str, event: EventDict) -> EventDict:
    """The lines of a traceback are kept and indented: its message can be a client's words."""
    return {
        key: "\n".join(f"    {escaped(line)}" for line in value.split("\n"))
        if key == "exception"
        else escaped(value)
        if isinstance(value, str)
        else value
        for key, value in event.items()
    }
