"""A service on more than one machine: replicas in a Ray cluster, each with a `Service` of its own.

The front is a `Service` like any other, with the HTTP application before it; what it takes on is
computed by replicas, which Ray Serve starts, watches, and adds to as the queue grows. A request
whose replica is lost is asked of another: its settings hold its seed, so the picture is the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError

from gentron.bundle import Bundle
from gentron.errors import BackendError, BundleError, CancelledError, GenTronError, RefusedError
from gentron.runtime.admission import Bounds
from gentron.runtime.cost_curve import CostCurve
from gentron.runtime.observer import Observer
from gentron.runtime.pipeline import Pipeline
from gentron.runtime.policy import Limits
from gentron.runtime.result import Result, Settings
from gentron.runtime.scheduling import Capacity
from gentron.runtime.service import Options, Service
from gentron.runtime.stages import PictureFilter, outcome_of
from gentron.runtime.ticket import Progress
from gentron.runtime.work import RUNNING, Needs, Work

log = logging.getLogger(__name__)
Size = tuple[int, int]
ATTEMPTS = 5  # replicas that one request may lose before it is blamed for it
PAUSE = 0.5  # seconds before another replica is asked
BESIDE_STEPS = 2  # requests a replica has in text encoder and decoder, besides those that step


@dataclass(frozen=True)
class Order:
    """A request on its way to a replica."""

    settings: Settings
    client: str
    priority: int
    deadline: float | None  # seconds from now
    previews: frozenset[int]


@dataclass(frozen=True)
class Replicas:
    """How many there are, what each may use, and how many requests it shares steps among."""

    least: int = 1
    most: int = 1
    samples: int = 8  # of one size that step together
    cpus: float = 1
    gpus: float = 0
    tuning: dict[str, Any] = field(default_factory=dict)  # of Ray's AutoscalingConfig

    def options(self, warm_up: Iterable[Size]) -> dict[str, Any]:
        """Of the deployment. Another replica comes when there are more requests for each than
        half of what it can hold."""
        return {
            "max_ongoing_requests": self.samples + BESIDE_STEPS,
            "autoscaling_config": {
                "min_replicas": self.least,
                "initial_replicas": self.least,
                "max_replicas": self.most,
                "target_ongoing_requests": max(1.0, self.samples / 2),
                **self.tuning,
            },
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
            "user_config": {"warm_up": [list(size) for size in warm_up]},
            "health_check_period_s": 5,
            "graceful_shutdown_timeout_s": 60,
        }


class Replica:
    """One of them, in a process that Ray starts on some machine."""

    def __init__(self, load: Callable[[], Pipeline], digest: str, samples: int):
        """`load` makes the pipeline there. Raises BundleError if it has another bundle."""
        pipeline = load()
        if pipeline.bundle.digest != digest:
            pipeline.close()
            raise BundleError(
                f"{pipeline.path} differs on {ray.util.get_node_ip_address()}; copy the bundle "
                "there, so that all machines have the same under one path"
            )
        unbounded = Bounds(requests=1 << 30)  # Ray counts them
        self._service = Service(
            pipeline, Options(bounds=unbounded, capacity=Capacity(samples=samples)), owns=True
        )

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Ray calls it before the first request."""
        await self._service.warm_up([(width, height) for width, height in config["warm_up"]])

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self._service.healthy:
            raise RuntimeError("the scheduler has ended")

    async def draw(self, order: Order) -> AsyncIterator[Progress | Result | GenTronError]:
        """Its steps, then what it ends with. Ray closes the iterator of a request that was
        cancelled, which cancels it here."""
        try:
            ticket = self._service.submit(
                order.settings,
                client=order.client,
                priority=order.priority,
                deadline=order.deadline,
                previews=order.previews,
            )
            async with ticket:
                async for step in ticket:
                    yield step
                yield await ticket.result()
        except GenTronError as error:
            yield error


class _NoTime(CostCurve):
    """The replicas measure their own calls, and hold deadlines against them."""

    def seconds(self, shape: Any, units: float) -> float:  # noqa: ARG002
        return 0.0

    def per_unit(self, shape: Any) -> float:  # noqa: ARG002
        return 0.0


class Fleet:
    """The replicas as a scheduler: what they are asked, and asked again. `submit` belongs to an
    event loop's thread."""

    curve: CostCurve = _NoTime()

    def __init__(self, name: str, handle: Any, limits: Limits, observer: Observer):
        self.name, self.limits, self._observer = name, limits, observer
        self._handle = handle.options(stream=True)
        self._tasks: dict[Work, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open = True
        self.asked_again = 0  # requests whose replica was lost, counted each time

    def listen(self, on_end: Callable[[Work], None], picture_filter: PictureFilter) -> None:
        self._on_end, self._filter = on_end, picture_filter

    def submit(self, work: Work, needs: Needs) -> None:  # noqa: ARG002
        self._loop = asyncio.get_running_loop()
        task = self._tasks[work] = self._loop.create_task(self._run(work))
        task.add_done_callback(lambda _: self._tasks.pop(work))

    def cancel(self, work: Work) -> None:
        work.cancelled = True
        if (task := self._tasks.get(work)) is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """Fails what is under way with CancelledError, and ends the replicas; idempotent."""
        if not self._open:
            return
        self._open = False
        for work in list(self._tasks):
            self.cancel(work)
        serve.delete(self.name)

    @property
    def alive(self) -> bool:
        return self._open and ray.is_initialized()

    async def _run(self, work: Work) -> None:
        try:
            result = await self._result(work)
            if reason := await asyncio.to_thread(self._filter, result.videos):
                raise RefusedError(f"the picture was refused: {reason}")
        except asyncio.CancelledError:
            self._fail(work, CancelledError("the request was cancelled"))
        except Exception as error:
            self._fail(work, error)
        else:
            self._end(work, "completed")
            work.on_result(result)

    def _fail(self, work: Work, error: Exception) -> None:
        self._end(work, outcome_of(error))
        work.on_error(error)

    def _end(self, work: Work, outcome: str) -> None:
        self._observer.finished(outcome, time.monotonic() - work.arrived)
        self._on_end(work)

    async def _result(self, work: Work) -> Result:
        """Of the first replica that lives long enough. Steps that were told are not told again."""
        told: set[tuple[int, bool]] = set()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._ask(work, told)
            except (RayTaskError, TaskCancelledError):
                raise
            except DeploymentUnavailableError as error:
                raise BackendError(
                    "there is no replica and none can be started; see the logs of Ray"
                ) from error
            except (RayError, _Leaving) as error:
                self.asked_again += 1
                log.warning("request %d: its replica was lost (%s), attempt %d of %d",
                            work.number, type(error).__name__, attempt, ATTEMPTS)  # fmt: skip
            await asyncio.sleep(PAUSE)
        raise BackendError(
            f"{ATTEMPTS} replicas were lost while they computed this request; see the logs of Ray"
        )

    async def _ask(self, work: Work, told: set[tuple[int, bool]]) -> Result:
        left = None if work.deadline is None else work.deadline - time.monotonic()
        settings = work.request.settings
        order = Order(settings, work.client, work.priority, left, work.previews)
        answers = self._handle.draw.remote(order)
        try:
            async for answer in answers:
                match answer:
                    case Result():
                        return answer
                    case CancelledError():
                        raise _Leaving
                    case GenTronError():
                        raise answer
                key = (answer.index, answer.preview is not None)
                if key not in told:
                    told.add(key)
                    work.on_state(RUNNING)
                    work.on_progress(answer)
        except asyncio.CancelledError:
            answers.cancel()
            raise
        raise _Leaving


class _Leaving(Exception):
    """A replica ended a request that nobody has cancelled: it is being replaced."""


class Front(Service):
    """A service whose requests are computed by the replicas."""

    async def warm_up(self, sizes: Iterable[Size] = ()) -> None:
        """Each replica does it for itself before its first request."""


class Described(Pipeline):
    """A bundle without engines: enough to fill in and check settings."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle

    def close(self) -> None:
        """There is nothing to free."""


def connect(address: str | None, **options: Any) -> None:
    """Joins the cluster at `address`, "auto" for this machine's; None starts one that lives as
    long as this process. Raises BackendError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        ray.init(address=address or "local", log_to_driver=False, configure_logging=False,
                 **options)  # fmt: skip
        serve.start(proxy_location="Disabled")
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:  # or has no token
        raise BackendError(
            f"the Ray cluster {address or 'local'!r} cannot be joined ({error}); start it with: "
            "ray start --head"
        ) from error


def open_front(
    bundle: Bundle,
    load: Callable[[], Pipeline],
    replicas: Replicas,
    options: Options | None = None,
    warm_up: Iterable[Size] = (),
) -> Front:
    """Deploys replicas on the cluster that was joined, and returns once the least of them are
    ready; closing the front ends them. `load` is pickled and called on their machines. Raises
    BackendError."""
    name = f"gentron-{secrets.token_hex(4)}"  # beside the one that a reload replaces
    deployment = serve.deployment(Replica, name="Replica", **replicas.options(warm_up))
    try:
        handle = serve.run(
            deployment.bind(load, bundle.digest, replicas.samples), name=name, route_prefix=None
        )
    except RuntimeError as error:
        serve.delete(name)
        raise BackendError(f"no replica could be started: {error}") from error
    memory, options = Capacity(), options or Options()
    limits = Limits(replicas.samples, (memory.state_bytes, memory.table_rows, memory.texts))
    fleet = Fleet(name, handle, limits, options.observer)
    return Front(Described(bundle), options, scheduler=fleet)
