"""Who is let in: keys, limits, hosts, origins; and what can be done with a request's text."""

from __future__ import annotations

import json
import logging
import time

import httpx
import pytest

from gentron.runtime.http_access import Access
from gentron.runtime.keys import Key, Keys, hash_of, new_key

ANN, BOB = new_key(), new_key()
SMALL = {"prompt": "a cat", "size": "16x16", "gentron": {"steps": 1, "seed": 1}}
IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    Keys({"ann": Key("ann", hash_of(ANN)), "bob": Key("bob", hash_of(BOB), 4)}).write(file)
    return file


@pytest.fixture(scope="module")
def locked(video_pipeline, key_file, listening):
    with listening(video_pipeline, access=Access(key_file, None)) as asked:
        yield asked


@pytest.fixture(scope="module")
def open_to_all(video_pipeline, listening):
    with listening(video_pipeline, access=Access()) as asked:
        yield asked


def test_without_a_key_only_what_tells_nothing_is_answered(locked):
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert locked.ask(path, method="GET").status_code == 200
    assert locked.ask("/", method="GET").status_code in (200, 404)  # the page, where there is one
    for method, path in (
        ("POST", IMAGES), ("GET", "/v1/models"), ("GET", "/v1/videos"), ("GET", "/metrics"),
        ("GET", "/nowhere"), ("POST", "/healthz"), ("DELETE", "/v1/videos/video_00"),
        ("GET", "//metrics"), ("GET", "/static/../metrics"), ("GET", "/Metrics"),
    ):  # fmt: skip
        answer = locked.ask(path, method=method)
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"].startswith('Bearer realm="gentron"')
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


def test_a_key_is_asked_for_as_it_was_made(locked):
    assert locked.ask(key=ANN).status_code == 200
    for wrong in (ANN[:-1], ANN + "x", "gentron-", "x" * 10_000):
        answer = locked.ask(key=wrong)
        assert answer.status_code == 401
        assert wrong not in answer.text
    for scheme in ("", "Basic ", "Bearer"):
        assert locked.ask(authorization=scheme + ANN).status_code == 401
    assert locked.ask(authorization=f"bearer {ANN}").status_code == 200


def test_whose_key_it_is_decides_whose_jobs_are_seen(locked):
    body = {"prompt": "a cat", "size": "16x16", "gentron": {"frames": 2, "steps": 1}}
    made = locked.ask("/v1/videos", ANN, body)
    path = f"/v1/videos/{made.json()['id']}"
    assert locked.ask(path, ANN, method="GET").status_code == 200
    assert locked.ask(path, BOB, method="GET").status_code == 404
    assert locked.ask(path, BOB, method="DELETE").status_code == 404
    assert locked.ask("/v1/videos", BOB, method="GET").json()["data"] == []


def test_a_key_with_a_limit_is_told_when_to_come_again(locked):
    time.sleep(0.1)
    codes = [locked.ask(key=BOB).status_code for _ in range(3)]
    assert codes.count(429) >= 1
    refused = locked.ask(key=BOB)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert locked.ask(key=ANN).status_code == 200
    assert locked.ask("/v1/models", BOB, method="GET").status_code == 200
    assert locked.metrics.registry.get_sample_value(
        "gentron_http_refused_total", {"reason": "rate_limit"}
    )


def test_a_key_that_is_taken_away_is_refused_within_seconds_and_a_wrong_file_changes_nothing(
    video_pipeline, tmp_path, caplog
):
    file = tmp_path / "keys"
    Keys({"ann": Key("ann", hash_of(ANN)), "bob": Key("bob", hash_of(BOB))}).write(file)
    access = Access(file, None)
    head = {"authorization": f"Bearer {BOB}"}

    def judged():
        return access.judge("POST", IMAGES, head.get, "")[0]

    assert judged() == "bob"
    file.write_text("nonsense")
    access._looked -= 2
    assert judged() == "bob"
    assert "the keys stay as they were" in caplog.text
    Keys({"ann": Key("ann", hash_of(ANN))}).write(file)
    access._looked -= 2
    assert judged() == ""


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("127.0.0.1:80", True), ("localhost", True), ("[::1]:9", True), ("192.168.1.2", True),
        ("LOCALHOST:8000", True), ("evil.example", False), ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:80", False), ("", False), ("[", False), ("a@127.0.0.1", True),
    ],
)  # fmt: skip
def test_a_name_that_somebody_pointed_here_is_not_answered(host, answered):
    """DNS rebinding: the page's own name, resolved to this machine."""
    _, refusal = Access().judge("POST", IMAGES, {"host": host}.get, "")
    assert (refusal is None) == answered
    assert refusal is None or refusal.status == 421
    assert (
        Access(hosts={"gpu.example"}).judge("GET", "/", {"host": "gpu.example:1"}.get, "")[1]
        is None
    )


@pytest.mark.parametrize(
    ("origin", "answered"),
    [
        (None, True), ("http://127.0.0.1:8000", True), ("http://evil.example", False),
        ("null", False), ("http://127.0.0.1:8001", False), ("file://", False), ("", False),
        ("http://127.0.0.1:8000.evil.example", False),
        ("http://evil.example\\@127.0.0.1:8000", False),
    ],
)  # fmt: skip
def test_pages_of_other_sites_may_not_ask(origin, answered):
    head = {"host": "127.0.0.1:8000"} | ({} if origin is None else {"origin": origin})
    _, refusal = Access().judge("POST", IMAGES, head.get, "")
    assert (refusal is None) == answered
    assert refusal is None or refusal.status == 403


def test_a_form_of_another_site_draws_nothing_and_no_answer_invites_one(open_to_all):
    refused = open_to_all.ask(origin="http://evil.example", content_type="text/plain")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin")
    answer = open_to_all.ask()
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_a_request_keeps_its_name_if_it_is_a_sane_one(open_to_all):
    assert open_to_all.ask(x_request_id="job-7.1:a_b").headers["x-request-id"] == "job-7.1:a_b"
    for odd in ("a b", "x" * 65, "a\x1b[31m", "%0d%0a", ""):
        found = open_to_all.ask("/healthz", method="GET", x_request_id=odd).headers["x-request-id"]
        assert found.startswith("req-")
        assert found != odd


@pytest.mark.parametrize("deep", [b"[", b'{"a":', b'{"prompt":[', b'[{"":'])
@pytest.mark.parametrize("path", [IMAGES, "/v1/videos"])
def test_json_that_is_nested_deep_is_a_mistake_like_any_other(open_to_all, deep, path):
    """As deep as a body can be; 100,000 levels fit into it."""
    body = (deep * 130_000)[:131_000]
    answer = httpx.post(
        open_to_all.url + path, content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    whole = b"[" * 60_000 + b"]" * 60_000
    body = b'{"prompt": "a", "gentron": ' + whole + b"}"
    answer = httpx.post(
        open_to_all.url + path, content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400


def test_a_large_body_is_refused_before_it_is_read_to_the_end(open_to_all):
    head = f"POST {IMAGES} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {1 << 40}\r\n\r\n"
    assert open_to_all.raw(head.encode() + b"x" * 140_000).startswith(b"HTTP/1.1 413")


def test_lines_in_headers_split_nothing(open_to_all):
    for line in (b"x-request-id: a\rset-cookie: b", b"x-request-id: a\x00b", b"x-request-id : a",
                 b" folded: a", b"authorization: Bearer a\nb"):  # fmt: skip
        found = open_to_all.raw(
            b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            + line
            + b"\r\nconnection: close\r\n\r\n"
        )
        assert found.split(b"\r\n\r\n")[0].count(b"HTTP/1.1") == 1
        assert b"set-cookie" not in found.lower()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/videos/..",
        "/v1/videos/video_..%2f..%2fetc%2fpasswd/content", "/v1/videos/%00",
        "/static/../gentron.json", "/v1/videos/video_%0d%0aset-cookie",
        "/static/..%2f..%2fpyproject.toml", "/static//etc/passwd",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file(open_to_all, path):
    found = open_to_all.raw(
        f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode()
    )
    status = int(found.split(b" ")[1])
    assert status in (400, 404), found[:300]
    assert b"root:" not in found
    assert b"set-cookie" not in found.split(b"\r\n\r\n")[0].lower()


def test_prompts_are_not_logged_unless_asked_for(video_pipeline, listening, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "a very particular cat"
    for wanted in (False, True):
        caplog.clear()
        with listening(video_pipeline, access=Access(), log_prompts=wanted) as asked:
            assert asked.ask(body=SMALL | {"prompt": secret}).status_code == 200
            bad = asked.ask(body=SMALL | {"prompt": secret, "gentron": {"steps": 10**9}})
            assert bad.status_code == 400
        ours = [vars(r) for r in caplog.records if r.name.startswith(("gentron", "uvicorn"))]
        logged = json.dumps(ours, default=str)
        assert (secret in logged) == wanted
