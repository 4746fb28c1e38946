"""What the service tells of itself as it works. The base class listens to nothing."""

from __future__ import annotations


class Observer:
    """Called from several threads; must not block."""

    def queued(self, waiting: int, running: int) -> None:
        """Requests that wait and that are under way, whenever one of them changed."""

    def started(self, waited: float) -> None:
        """A request left the queue after so many seconds."""

    def stepped(self, samples: int, rows: int, seconds: float) -> None:
        """One call of the denoiser."""

    def first_step(self, seconds: float) -> None:
        """A request's first step is done, so many seconds after it arrived."""

    def staged(self, stage: str, seconds: float) -> None:
        """A stage of one request: text, condition, denoise, decode, preview."""

    def finished(self, outcome: str, seconds: float) -> None:
        """A request ended: completed, cancelled, expired, failed, refused; seconds since it
        arrived."""

    def retried(self) -> None:
        """A call failed and is tried again, or in parts."""
