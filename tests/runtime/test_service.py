"""Many requests at once: each gets its own picture, whatever shared its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from gentron.runtime import Pipeline
from gentron.runtime.service import Service


@pytest.fixture(scope="module")
def emoji() -> Iterator[Pipeline]:
    with Pipeline.load("emoji", backend="onnxruntime") as pipeline:
        yield pipeline


MIXED = [
    {
        "prompt": ("a red apple", "a blue cat", "a dog", "")[i % 4],
        "negative": ("", "a green leaf")[i % 3 == 0],
        "seed": i,
        "steps": 2 + i % 5,
        "guidance": (4.0, 1.0, 7.5)[i % 3],
        "size": ((128, 128), (64, 96), (64, 64))[i % 3],
        "batch": 1 + (i % 7 == 0),
        "solver": ("euler", "dpm++2m", "unipc")[i % 3],
    }
    for i in range(24)
]


def test_twenty_four_requests_at_once_get_their_offline_pictures(emoji):
    wanted = [emoji(**request).images for request in MIXED]

    async def serve():
        async with Service(emoji) as service:
            tickets = [service.submit(**request) for request in MIXED]
            return [await ticket.result() for ticket in tickets]

    for result, pictures in zip(asyncio.run(serve()), wanted, strict=True):
        difference = np.abs(result.images.astype(int) - pictures)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_a_ticket_reports_its_steps_and_then_the_result(emoji):
    async def serve():
        async with Service(emoji) as service:
            ticket = service.submit("a cat", seed=1, steps=4, size=(64, 64), previews=[1])
            steps = [step async for step in ticket]
            return steps, (await ticket.result()).images

    steps, pictures = asyncio.run(serve())
    assert [s.preview.shape for s in steps if s.preview is not None] == [(1, 64, 64, 3)]
    indices = [step.index for step in steps if step.preview is None]
    assert indices == sorted(indices)
    assert indices[-1] == 3
    assert {step.total for step in steps} == {4}
    assert pictures.shape == (1, 64, 64, 3)
