"""OpenTelemetry spans of a request, where it is installed and the program set a provider up.

A request's span lies inside the one that is current when it is submitted (an HTTP server's), and
holds one for each stage. Prompts are in none of them.
"""

from __future__ import annotations

import time
from typing import Any

from gentron.runtime.result import Settings


class Trace:
    """Of one request. This one records nothing; any thread may call, one at a time."""

    def stage(self, name: str, seconds: float, calls: int) -> None:
        """A stage has just ended. `seconds` it computed: for the steps, together with others."""

    def end(self, outcome: str) -> None: ...


def start_trace(settings: Settings) -> Trace:
    try:
        from opentelemetry import trace
    except ImportError:
        return Trace()
    tracer = trace.get_tracer("gentron")
    names = ("width", "height", "frames", "batch", "steps", "solver")
    attributes = {f"gentron.{name}": getattr(settings, name) for name in names}
    span = tracer.start_span("gentron.request", attributes=attributes)
    return _Recorded(tracer, span) if span.is_recording() else Trace()


class _Recorded(Trace):
    def __init__(self, tracer: Any, span: Any):
        self._tracer, self._span, self._since = tracer, span, time.time_ns()

    def stage(self, name: str, seconds: float, calls: int) -> None:
        from opentelemetry.trace import set_span_in_context

        now = time.time_ns()
        # The steps begin when the conditioning is there, and take turns with those of others.
        start = self._since if name == "denoise" else now - int(seconds * 1e9)
        self._since = now
        span = self._tracer.start_span(
            f"gentron.{name}",
            context=set_span_in_context(self._span),
            start_time=start,
            attributes={"gentron.seconds": seconds, "gentron.calls": calls},
        )
        span.end(now)

    def end(self, outcome: str) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("gentron.outcome", outcome)
        if outcome == "failed":
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
