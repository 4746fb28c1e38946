"""What is logged: as JSON or for a person, nothing forged, nothing told that was not asked for."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest
from structlog.contextvars import bound_contextvars

from gentron.runtime import server_log

NASTY = "a\n2026-01-01 [error] forged\r\x1b[31mred\u2028\x00"


@pytest.fixture
def logged(monkeypatch):
    """`logged(format)` configures; its `getvalue()` is what was written."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def start(form):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        server_log.configure(form)
        return stream

    yield start
    root.handlers[:], _ = handlers, root.setLevel(level)


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_clients_text_forges_no_line_and_steers_no_terminal(logged, form):
    stream = logged(form)
    with bound_contextvars(request_id="r1"):
        logging.getLogger("gentron.x").info(
            "request %s", NASTY, extra={"path": NASTY, "status": 200, "unknown": "x"}
        )
    (line,) = stream.getvalue().splitlines()
    assert not set(line) & set("\x1b\r\x00\u2028")
    assert "r1" in line
    assert "forged" in line
    if form == "json":
        found = json.loads(line)
        assert (found["path"], found["request_id"], found["level"]) == (NASTY, "r1", "info")
        assert "unknown" not in found


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_shows_no_local_variable_and_its_message_forges_no_line(logged, form):
    stream = logged(form)
    prompt = "very" + "secret"
    try:
        raise ValueError(NASTY)
    except ValueError:
        logging.getLogger("gentron.x").exception("defect")
    text = stream.getvalue()
    assert "ValueError" in text
    assert prompt not in text
    assert "\x1b" not in text
    if form == "json":
        assert "ValueError" in json.loads(text)["exception"]
    else:
        assert all(line.startswith("    ") for line in text.splitlines()[1:])
