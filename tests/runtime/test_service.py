"""Many requests at once: each gets its own picture, whatever shared its steps and went wrong."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gentron.errors import (
    CancelledError,
    NonFiniteError,
    ResourceError,
)
from gentron.runtime import Pipeline
from gentron.runtime.request import Request
from gentron.runtime.sample import Sample
from gentron.runtime.step_batch import Member
from gentron.runtime.ticket import Ticket
from gentron.runtime.work import Work

SOLVERS = ("ddim", "dpm++2m", "ddpm", "unipc")


def mixed(i: int) -> dict[str, Any]:
    """Requests that differ in everything; every fourth is a video."""
    return {
        "prompt": ("a cat", "a red car", "two birds", "")[i % 4],
        "negative": ("", "a green leaf")[i % 3 == 0],
        "seed": 100 * i,
        "steps": 2 + i % 5,
        "guidance": (4.0, 1.0, 7.5)[i % 3],
        "motion": (1.0, 1.3)[i % 2],
        "guidance_interval": (None, None, (0.5, 8.0))[i % 3],
        "size": ((16, 16), (16, 24))[i % 8 == 1],
        "frames": 3 if i % 4 == 3 else 1,
        "batch": 1 + (i % 7 == 0),
        "solver": SOLVERS[i % 4],
    }


def assert_same(found: Any, wanted: Any) -> None:
    assert found.settings == wanted.settings
    assert found.latents.shape == wanted.latents.shape
    scale = np.abs(wanted.latents).max()
    assert np.abs(found.latents - wanted.latents).max() < 1e-3 * scale
    assert np.abs(found.videos.astype(int) - wanted.videos).max() <= 1


def living() -> Counter[str]:
    """How many of the objects that a request is made of are still there."""
    gc.collect()
    kinds = (Ticket, Work, Sample, Member)
    return Counter(type(o).__name__ for o in gc.get_objects() if type(o) in kinds)


async def outcomes(tickets: list[Any]) -> list[Any]:
    return await asyncio.gather(*(t.result() for t in tickets), return_exceptions=True)


@pytest.fixture(scope="session")
def wanted(video_pipeline: Pipeline) -> Callable[[int], Any]:
    kept: dict[int, Any] = {}

    def get(i: int) -> Any:
        if i not in kept:
            kept[i] = video_pipeline(**mixed(i))
        return kept[i]

    return get


def test_twenty_four_requests_at_once_get_their_offline_pictures(serve, video_pipeline, wanted):
    async def work(service):
        tickets = [service.submit(**mixed(i)) for i in range(24)]
        results = [await ticket.result() for ticket in tickets]
        return results, service.scheduler.limits

    results, _ = serve(video_pipeline, work)
    for i, result in enumerate(results):
        assert_same(result, wanted(i))
    assert [s.stage for s in results[0].stages] == ["text", "condition", "denoise", "decode"]


def test_when_calls_take_a_few_of_them_the_pictures_are_the_same(serve, video_pipeline, wanted):
    """Members without a step pass through, and slots are filled and left in any order."""

    async def work(service):
        scheduler = service.scheduler
        scheduler.limits = replace(scheduler.limits, units=lambda shape: 60.0)
        tickets = [service.submit(**mixed(i)) for i in range(24)]
        return [await ticket.result() for ticket in tickets]

    for i, result in enumerate(serve(video_pipeline, work)):
        assert_same(result, wanted(i))


def test_five_hundred_requests_of_which_a_third_are_cancelled(serve, video_pipeline, wanted):
    """The rest are right, and nothing of the cancelled stays."""
    chance = random.Random(0)
    before = living()
    lost = set(chance.sample(range(500), 150))

    async def follow(service, i):
        ticket = service.submit(**mixed(i % 24), client=f"client {i % 5}")
        if i in lost:
            wait = chance.randrange(4)
            if wait:
                async for step in ticket:
                    if step.index + 1 >= wait:
                        break
            ticket.cancel()
        try:
            return await ticket.result()
        except CancelledError:
            return None

    async def work(service):
        found = []
        for start in range(0, 500, 50):
            following = [asyncio.create_task(follow(service, i)) for i in range(start, start + 50)]
            await asyncio.sleep(0)  # all of them are asked for
            if not start:
                assert (living() - before)["Ticket"] >= 50
            found += await asyncio.gather(*following)
        return found

    found = serve(video_pipeline, work)
    for i, result in enumerate(found):
        if result is None:
            assert i in lost
        else:
            assert_same(result, wanted(i % 24))
    assert sum(result is None for result in found) > 100
    assert living() == before


def test_a_call_that_fails_once_is_tried_again(serve, video_pipeline, wanted, faults):
    failed = []

    def once(rows):
        if not failed:
            failed.append(rows)
            raise RuntimeError("the device had a hiccup")

    faults.append(once)

    async def work(service):
        return await outcomes([service.submit(**mixed(i)) for i in range(6)])

    for i, result in enumerate(serve(video_pipeline, work)):
        assert_same(result, wanted(i))
    assert failed


def test_what_is_logged_of_a_call_that_fails_has_the_names_of_its_requests(
    serve, video_pipeline, faults
):
    name, named = ContextVar("name", default=""), set()

    class Names(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            named.add((name.get(), record.levelname))

    def broken(rows):
        raise RuntimeError("the device has gone")

    async def work(service):
        faults.append(broken)
        tickets = []
        for i in range(3):
            name.set(f"request {i}")
            tickets.append(service.submit(**mixed(i)))
        return await outcomes(tickets)

    log, handler = logging.getLogger("gentron.runtime.scheduling"), Names()
    log.addHandler(handler)
    try:
        found = serve(video_pipeline, work)
    finally:
        log.removeHandler(handler)
    assert all(isinstance(error, RuntimeError) for error in found)
    assert named == {(f"request {i}", "WARNING") for i in range(3)}


def test_calls_that_are_too_large_for_the_device_are_split(serve, video_pipeline, wanted, faults):
    seen = []

    def small(rows):
        seen.append(rows)
        if rows > 4:
            raise MemoryError("no room for so many rows")

    faults.append(small)

    async def work(service):
        return await outcomes([service.submit(**mixed(i)) for i in range(12)])

    results = serve(video_pipeline, work)
    for i, result in enumerate(results):
        if i in (7,):  # two samples of a video with three branches: six rows, however split
            assert isinstance(result, MemoryError)
        else:
            assert_same(result, wanted(i))
    assert max(seen) > 4


@pytest.mark.parametrize("units", [float("inf"), 40.0])
def test_a_sample_that_is_not_finite_fails_alone(serve, video_pipeline, wanted, monkeypatch, units):
    samples = Request.samples

    def poisoned(self, encoded):
        found = samples(self, encoded)
        if self.settings.seed == 400:
            updates = found[0].table.updates.copy()
            updates[1, 0, 0] = np.nan
            found[0] = replace(found[0], table=replace(found[0].table, updates=updates))
        return found

    monkeypatch.setattr(Request, "samples", poisoned)

    async def work(service):
        scheduler = service.scheduler
        scheduler.limits = replace(scheduler.limits, units=lambda shape: units)
        return await outcomes([service.submit(**mixed(i)) for i in range(8)])

    results = serve(video_pipeline, work)
    assert isinstance(results[4], NonFiniteError)
    assert "denoiser, step 2 of 6" in str(results[4])
    for i in {*range(8)} - {4}:
        assert_same(results[i], wanted(i))


def test_no_memory_for_a_request_fails_it_and_later_ones_go_on(
    serve, video_pipeline, wanted, monkeypatch
):
    engine = video_pipeline._engines["denoiser"]
    buffer = engine.buffer

    def limited(name, shape):
        if name == "state" and shape[2] == 3:  # the video's
            raise ResourceError("GPU memory: 1.0 GB more is needed")
        return buffer(name, shape)

    monkeypatch.setattr(engine, "buffer", limited, raising=False)

    async def work(service):
        first = await outcomes([service.submit(**mixed(i)) for i in range(6)])
        return first + await outcomes([service.submit(**mixed(6))])

    results = serve(video_pipeline, work)
    assert isinstance(results[3], ResourceError)
    for i in (0, 1, 2, 4, 5, 6):
        assert_same(results[i], wanted(i))


def test_steps_go_on_while_a_text_is_encoded_and_a_picture_decoded(
    serve, video_pipeline, monkeypatch
):
    slow = 0.6
    text, decode = video_pipeline._text.encode, video_pipeline.decode

    def encode(prompts):
        if "slow text" in prompts:
            time.sleep(slow)
        return text(prompts)

    def decoded(latents):
        time.sleep(slow)
        return decode(latents)

    monkeypatch.setattr(video_pipeline._text, "encode", encode)
    monkeypatch.setattr(video_pipeline, "decode", decoded)
    options = {"steps": 200, "size": (16, 16), "seed": 1}

    async def work(service):
        running = service.submit("a cat", **options)
        await anext(aiter(running))
        before = time.monotonic(), running.done_steps
        others = [service.submit("slow text", steps=1, seed=2, size=(16, 16)),
                  service.submit("a cat", steps=1, seed=3, size=(16, 16))]  # fmt: skip
        gaps, last = [], time.monotonic()
        async for _ in running:
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
        await outcomes([running, *others])
        return before, max(gaps[:-1])

    _, longest = serve(video_pipeline, work)
    assert longest < slow / 2


def test_cancelling_stops_the_steps_of_that_request_and_no_others(
    serve, video_pipeline, wanted, faults
):
    calls = []
    faults.append(lambda rows: (calls.append(rows), time.sleep(0.01)))

    async def work(service):
        kept = service.submit(**mixed(0))
        dropped = service.submit("a cat", seed=5, steps=200)
        waiting = service.submit("a cat", seed=6, steps=200)
        waiting.cancel()
        async for step in dropped:
            if step.index == 1:
                dropped.cancel()
                break
        with pytest.raises(CancelledError):
            await dropped.result()
        return await kept.result()

    assert_same(serve(video_pipeline, work), wanted(0))
    assert len(calls) < 50


def test_a_slow_reader_holds_nobody_up_and_misses_no_preview(serve, video_pipeline):
    async def work(service):
        slow = service.submit("a cat", seed=1, steps=30, previews=[3, 20])
        quick = service.submit("a dog", seed=1, steps=30)
        steps = aiter(slow)
        await anext(steps)
        await quick.result()
        await slow.result()
        return [step async for step in steps]

    rest = serve(video_pipeline, work)
    assert [step.index for step in rest if step.preview is not None] == [3, 20]
    assert len(rest) < 30


def test_the_last_preview_is_nearly_the_picture(serve, video_pipeline):
    async def work(service):
        ticket = service.submit("a cat", seed=1, steps=6, previews=[0, 4])
        previews = [step.preview async for step in ticket if step.preview is not None]
        return previews, (await ticket.result()).images

    offline = video_pipeline.stream("a cat", seed=1, steps=6)
    expected = [step.preview() for step in offline]
    (first, late), _ = serve(video_pipeline, work)
    assert np.abs(first.astype(int) - expected[0]).max() <= 1
    assert np.abs(late.astype(int) - expected[4]).max() <= 1


def test_leaving_a_ticket_cancels_it(serve, video_pipeline):
    async def work(service):
        async with service.submit("a cat", seed=1, steps=200) as ticket:
            await anext(aiter(ticket))
        with pytest.raises(CancelledError):
            await ticket.result()

    serve(video_pipeline, work)
