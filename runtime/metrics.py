"""Every metric of the server, and nowhere else: names, kinds, buckets."""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gentron.runtime.observer import Observer
from gentron.runtime.result import resident_mib

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics(Observer):
    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._waiting = Gauge("gentron_requests_waiting", "Requests in the queue",
                              registry=registry)  # fmt: skip
        self._running = Gauge("gentron_requests_running", "Requests under way", registry=registry)
        self._queue = Histogram("gentron_queue_seconds", "From arrival to start",
                                buckets=SECONDS, registry=registry)  # fmt: skip
        self._first = Histogram("gentron_first_step_seconds", "From arrival to the first step",
                                buckets=SECONDS, registry=registry)  # fmt: skip
        self._step = Histogram("gentron_step_seconds", "One call of the denoiser",
                               buckets=SECONDS, registry=registry)  # fmt: skip
        self._rows = Histogram("gentron_step_rows", "Branch rows of a call", buckets=COUNTS,
                               registry=registry)  # fmt: skip
        self._samples = Histogram("gentron_step_samples", "Samples of a call", buckets=COUNTS,
                                  registry=registry)  # fmt: skip
        self._stage = Histogram("gentron_stage_seconds", "A stage of one request", ["stage"],
                                buckets=SECONDS, registry=registry)  # fmt: skip
        self._outcome = Counter("gentron_requests", "Requests that ended, by how", ["outcome"],
                                registry=registry)  # fmt: skip
        self._total = Histogram("gentron_request_seconds", "From arrival to the end", ["outcome"],
                                buckets=SECONDS, registry=registry)  # fmt: skip
        self._retries = Counter("gentron_retries", "Calls that failed and were tried again",
                                registry=registry)  # fmt: skip
        self._refused = Counter("gentron_http_refused", "Requests that met no route, by why",
                                ["reason"], registry=registry)  # fmt: skip
        self._draining = Gauge("gentron_draining", "1 while the server ends", registry=registry)
        self._reloads = Counter("gentron_reloads", "Bundles loaded in place of another, by outcome",
                                ["outcome"], registry=registry)  # fmt: skip
        self._bundle = Gauge("gentron_bundle_info", "1 for the bundle that new requests get",
                             ["name", "digest"], registry=registry)  # fmt: skip
        self._counts: dict[object, tuple[int, int]] = {}
        self._lock = threading.Lock()
        memory = Gauge("gentron_resident_bytes", "Memory of the process", registry=registry)
        memory.set_function(lambda: (resident_mib() or 0.0) * 2**20)

    def render(self) -> bytes:
        return bytes(generate_latest(self.registry))

    def of_service(self) -> Observer:
        """For one of several services, such as the one that ends while another takes its place."""
        return _OfService(self)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def draining(self) -> None:
        self._draining.set(1)

    def reloaded(self, outcome: str) -> None:
        self._reloads.labels(outcome).inc()

    def serves(self, name: str, digest: str) -> None:
        self._bundle.clear()
        self._bundle.labels(name, digest).set(1)

    def queued(self, waiting: int, running: int) -> None:
        self.counted(self, waiting, running)

    def counted(self, service: object, waiting: int, running: int) -> None:
        """The sum over all services is shown."""
        with self._lock:
            self._counts[service] = (waiting, running)
            if not waiting + running:
                del self._counts[service]
            self._waiting.set(sum(count[0] for count in self._counts.values()))
            self._running.set(sum(count[1] for count in self._counts.values()))

    def started(self, waited: float) -> None:
        self._queue.observe(waited)

    def stepped(self, samples: int, rows: int, seconds: float) -> None:
        self._samples.observe(samples)
        self._rows.observe(rows)
        self._step.observe(seconds)

    def first_step(self, seconds: float) -> None:
        self._first.observe(seconds)

    def staged(self, stage: str, seconds: float) -> None:
        self._stage.labels(stage).observe(seconds)

    def finished(self, outcome: str, seconds: float) -> None:
        self._outcome.labels(outcome).inc()
        self._total.labels(outcome).observe(seconds)

    def retried(self) -> None:
        self._retries.inc()


class _OfService(Observer):
    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self.started, self.stepped = metrics.started, metrics.stepped  # type: ignore[method-assign]
        self.first_step, self.staged = metrics.first_step, metrics.staged  # type: ignore[method-assign]
        self.finished, self.retried = metrics.finished, metrics.retried  # type: ignore[method-assign]

    def queued(self, waiting: int, running: int) -> None:
        self._metrics.counted(self, waiting, running)
