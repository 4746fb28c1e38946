"""What the service takes on and what it refuses, and when requests end without a picture."""

from __future__ import annotations

import asyncio
import time

import pytest

from gentron.errors import BusyError, CancelledError, DeadlineError, RefusedError, RequestError
from gentron.runtime.admission import Bounds
from gentron.runtime.service import Filters, Options, Service


def test_a_full_queue_says_when_to_come_again_and_a_place_is_free_afterwards(serve, video_pipeline):
    options = Options(bounds=Bounds(requests=2, per_client=1))

    async def work(service):
        first = service.submit("a cat", seed=1, steps=50, client="a")
        with pytest.raises(BusyError) as own:
            service.submit("a cat", seed=1, steps=2, client="a")
        second = service.submit("a dog", seed=1, steps=2, client="b")
        with pytest.raises(BusyError) as full:
            service.submit("a cat", seed=1, steps=2, client="c")
        assert own.value.retry_after >= 1
        assert full.value.retry_after >= 1
        await second.result()
        await service.submit("a cat", seed=1, steps=2, client="c").result()
        first.cancel()

    serve(video_pipeline, work, options)


def test_a_deadline_that_cannot_be_met_is_refused_and_one_that_passes_ends_the_request(
    serve, video_pipeline, faults
):
    async def work(service):
        await service.submit("a cat", seed=1, steps=8).result()  # measures a step
        with pytest.raises(DeadlineError, match="cannot be met"):
            service.submit("a cat", seed=1, steps=200, deadline=1e-4)
        faults.append(lambda rows: time.sleep(0.5))
        late = service.submit("a cat", seed=1, steps=20, deadline=2.0)
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="passed"):
            await late.result()
        return time.monotonic() - started

    assert serve(video_pipeline, work) < 4.0


def test_filters_refuse_a_prompt_at_once_and_a_picture_before_it_is_given(serve, video_pipeline):
    def prompt(text):
        return "no rats" if "rat" in text else None

    def picture(pictures):
        return "too dark" if pictures.shape[1] == 1 else None

    async def work(service):
        for refused in ({"prompt": "a rat"}, {"prompt": "a cat", "negative": "a rat"}):
            with pytest.raises(RefusedError, match="no rats"):
                service.submit(**refused)
        with pytest.raises(RefusedError, match="too dark"):
            await service.submit("a cat", seed=1, steps=1).result()
        return await service.submit("a cat", seed=1, steps=1, frames=2).result()

    options = Options(filters=Filters(prompt, picture))
    assert serve(video_pipeline, work, options).videos.shape[1] == 2


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"steps": 201}, "steps"),
        ({"batch": 5}, "n"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"priority": 3}, "priority"),
        ({"previews": range(9)}, "previews"),
        ({"size": (17, 16)}, "size"),
        ({"solver": "magic"}, "solver"),
    ],
)
def test_what_can_never_be_done_is_refused_by_name(serve, video_pipeline, request_, field):
    async def work(service):
        with pytest.raises(RequestError) as refused:
            service.submit(**{"prompt": "a cat", **request_})
        assert refused.value.field == field

    serve(video_pipeline, work)


def test_closing_ends_what_is_under_way(serve, video_pipeline):
    async def run():
        async with Service(video_pipeline) as service:
            tickets = [service.submit("a cat", seed=k, steps=200) for k in range(4)]
            await anext(aiter(tickets[0]))
        found = await asyncio.gather(*(t.result() for t in tickets), return_exceptions=True)
        with pytest.raises(CancelledError, match="closed"):
            service.submit("a cat")
        return found

    assert all(isinstance(error, CancelledError) for error in asyncio.run(run()))
