"""Requests whose replicas are lost, without a cluster: `scripts/lost_replica.py` has the real one,
and takes minutes."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from gentron.errors import (
    BackendError,
    BundleError,
    BusyError,
    CancelledError,
    DeadlineError,
    RefusedError,
    RequestError,
)
from gentron.runtime import Pipeline
from gentron.runtime.result import Result
from gentron.runtime.service import Filters, Options

pytest.importorskip("ray", reason="needs Ray: pip install 'gentron[ray]'")

import ray.exceptions
import ray.serve.exceptions

from gentron.runtime import ray_serve
from gentron.runtime.policy import Limits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
SIZE = (16, 16)


class Answers:
    """What a deployment's handle returns; after `lives` items, before the result at the latest (a
    slow reader is told fewer steps), the replica is lost."""

    def __init__(self, items: AsyncIterator[Any], lives: int | None):
        self._items, self._lives, self.cancelled = items, lives, False

    async def __aiter__(self) -> AsyncIterator[Any]:
        count = 0
        async for item in self._items:
            if self._lives is not None and (count == self._lives or isinstance(item, Result)):
                raise ray.exceptions.ActorDiedError
            count += 1
            yield pickle.loads(pickle.dumps(item))  # it comes from another process

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Of a deployment with one replica, which is lost as often as `lives` says and is replaced."""

    def __init__(self, replica: ray_serve.Replica, lives: list[int]):
        self._replica, self._lives, self.orders = replica, lives, []
        self.answers: list[Answers] = []

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    @property
    def draw(self) -> Any:
        handle = self

        class Method:
            @staticmethod
            def remote(order: ray_serve.Order) -> Answers:
                handle.orders.append(order)
                lives = handle._lives.pop(0) if handle._lives else None
                items = handle._replica.draw(pickle.loads(pickle.dumps(order)))
                handle.answers.append(Answers(items, lives))
                return handle.answers[-1]

        return Method()


@pytest.fixture
def fronted(
    tiny_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Handle]]:
    """Runs `work(front)` before a replica with these `lives`; returns what it returned, and the
    handle."""
    monkeypatch.setattr(ray_serve, "PAUSE", 0.01)
    monkeypatch.setattr(ray_serve.serve, "delete", lambda name: None)

    def run(work: Any, lives: tuple[int, ...] = (), options: Options | None = None) -> Any:
        async def inside() -> Any:
            options_ = options or Options()
            replica = ray_serve.Replica(lambda: tiny_pipeline, tiny_pipeline.bundle.digest, 4)
            replica._service._owns = False
            handle = Handle(replica, list(lives))
            fleet = ray_serve.Fleet("one", handle, Limits(4, (1 << 30,) * 3), options_.observer)
            described = ray_serve.Described(tiny_pipeline.bundle)
            async with ray_serve.Front(described, options_, scheduler=fleet) as front:
                found = await work(front)
                await asyncio.wait_for(front.idle(), 20)
            await replica._service.close()
            return found, handle

        return asyncio.run(inside())

    return run


class Gone:
    """A handle whose deployment has failed."""

    class draw:
        @staticmethod
        def remote(order: ray_serve.Order) -> Any:
            raise ray.serve.exceptions.DeploymentUnavailableError("it")


def same_picture(result: Any, pipeline: Pipeline) -> bool:
    again = pipeline.generate(result.settings)
    for _ in again:
        pass
    return bool(np.abs(result.videos.astype(int) - again.result().videos).max() <= 1)


def test_a_lost_replicas_request_is_drawn_again_and_no_step_is_told_twice(fronted, tiny_pipeline):
    async def work(front):
        ticket = front.submit("a cat", steps=6, size=SIZE, previews=[1])  # its seed is drawn here
        steps = [(s.index, s.preview is not None) async for s in ticket]
        return steps, await ticket.result()

    (steps, result), handle = fronted(work, lives=(4, 0))
    assert len(handle.orders) == 3
    assert len({order.settings.seed for order in handle.orders}) == 1
    assert same_picture(result, tiny_pipeline)
    assert len(steps) == len(set(steps))
    assert (1, True) in steps


def test_many_at_once_lose_their_replicas_and_all_are_answered(fronted, tiny_pipeline):
    async def work(front):
        tickets = [front.submit("a cat", seed=i, steps=3 + i % 3, size=SIZE) for i in range(8)]
        return await asyncio.gather(*(ticket.result() for ticket in tickets))

    results, handle = fronted(work, lives=(1, 2, 3, 0, 1, 2))
    assert [result.seeds for result in results] == [(i,) for i in range(8)]
    assert all(same_picture(result, tiny_pipeline) for result in results)
    assert len(handle.orders) == 8 + 6


def test_a_request_that_loses_every_replica_is_blamed_for_it(fronted, caplog):
    async def work(front):
        with pytest.raises(BackendError, match="5 replicas were lost"):
            await front.submit("a cat", steps=2, size=SIZE).result()

    with caplog.at_level(logging.WARNING):
        fronted(work, lives=(0,) * 5)
    assert "attempt 5 of 5" in caplog.text


def test_a_deployment_that_cannot_go_on_is_no_endless_wait(fronted):
    async def work(front):
        front.scheduler._handle = Gone()
        with pytest.raises(BackendError, match="none can be started"):
            await front.submit("a cat", steps=2, size=SIZE).result()

    fronted(work)


def test_what_is_wrong_is_told_at_once_or_by_the_replica_and_not_tried_again(fronted):
    async def work(front):
        with pytest.raises(RequestError, match="steps"):
            front.submit("a cat", steps=0)
        ticket = front.submit("a cat", steps=2, size=SIZE, deadline=1e-9)
        with pytest.raises(DeadlineError):
            await ticket.result()

    _, handle = fronted(work)
    assert len(handle.orders) == 1


def test_a_cancelled_request_is_cancelled_on_the_replica(fronted):
    async def work(front):
        ticket = front.submit("a cat", steps=200, size=SIZE)
        await anext(aiter(ticket))
        ticket.cancel()
        with pytest.raises(CancelledError):
            await ticket.result()

    _, handle = fronted(work)
    assert [answers.cancelled for answers in handle.answers] == [True]


def test_closing_the_front_ends_what_is_under_way_and_its_replicas(fronted, monkeypatch):
    deleted: list[str] = []
    monkeypatch.setattr(ray_serve.serve, "delete", deleted.append)

    async def work(front):
        monkeypatch.setattr(ray_serve.ray, "is_initialized", lambda: True)
        tickets = [front.submit("a cat", steps=200, size=SIZE) for _ in range(3)]
        await anext(aiter(tickets[0]))
        assert front.healthy
        await front.close()
        assert not front.healthy
        return await asyncio.gather(*(t.result() for t in tickets), return_exceptions=True)

    found, _ = fronted(work)
    assert [type(error) for error in found] == [CancelledError] * 3
    assert deleted == ["one"]


def test_a_refused_picture_is_refused_by_the_front(fronted):
    async def work(front):
        with pytest.raises(RefusedError, match="too red"):
            await front.submit("a cat", steps=2, size=SIZE).result()

    fronted(work, options=Options(filters=Filters(picture=lambda pictures: "too red")))


def test_a_machine_with_another_bundle_is_refused(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(tiny_pipeline, "close", lambda: None)
    monkeypatch.setattr(ray_serve.ray.util, "get_node_ip_address", lambda: "10.0.0.2")
    with pytest.raises(BundleError, match=r"differs on 10\.0\.0\.2; copy the bundle"):
        ray_serve.Replica(lambda: tiny_pipeline, "0" * 64, 4)


def test_errors_keep_their_fields_between_processes():
    for error in (RequestError("steps", "must be 1 or more"), BusyError("later", 3.0)):
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
