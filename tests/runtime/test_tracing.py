"""Spans of a request, in memory."""

from __future__ import annotations

import itertools
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gentron.errors import CancelledError
from gentron.runtime.tracing import Trace, start_trace


@pytest.fixture
def provider(monkeypatch):
    provider = TracerProvider()
    provider.spans = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(provider.spans))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return provider


def test_a_request_has_a_span_with_its_stages_inside_the_callers(serve, tiny_pipeline, provider):
    async def work(service):
        with provider.get_tracer("caller").start_as_current_span("POST"):
            await service.submit("a walrus", seed=1, steps=3, size=(16, 16)).result()
        late = service.submit("a walrus", seed=1, steps=200)
        late.cancel()
        with pytest.raises(CancelledError):
            await late.result()

    serve(tiny_pipeline, work)
    spans = {span.name: span for span in reversed(provider.spans.get_finished_spans())}
    outer, request = spans["POST"], spans["gentron.request"]
    assert request.parent.span_id == outer.context.span_id
    assert request.attributes["gentron.outcome"] == "completed"
    assert request.attributes["gentron.steps"] == 3
    stages = [spans[f"gentron.{name}"] for name in ("text", "condition", "denoise", "decode")]
    for before, after in itertools.pairwise(stages):
        assert before.parent.span_id == after.parent.span_id == request.context.span_id
        assert request.start_time <= before.start_time <= before.end_time <= after.end_time
    assert spans["gentron.denoise"].attributes["gentron.calls"] == 3
    outcomes = [
        span.attributes["gentron.outcome"]
        for span in provider.spans.get_finished_spans()
        if span.name == "gentron.request"
    ]
    assert sorted(outcomes) == ["cancelled", "completed"]
    assert not any("walrus" in span.to_json() for span in provider.spans.get_finished_spans())


def test_nothing_is_recorded_without_a_provider_or_the_package(tiny_pipeline, monkeypatch):
    settings = tiny_pipeline.settings("a cat")
    assert type(start_trace(settings)) is Trace
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert type(start_trace(settings)) is Trace
