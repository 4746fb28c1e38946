"""gentron-serve as a process: it says what is missing, it serves, it ends when told to."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

from gentron.cli import key, serve
from gentron.runtime.job_store import JobStore
from gentron.runtime.keys import Keys


def test_without_its_packages_it_says_what_to_install(in_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = in_process("gentron-serve", serve.cli)()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the server's packages are missing")
    assert "pip install 'gentron[serve]'" in done.stderr


def test_a_bundle_that_is_not_there_is_one_line(in_process):
    done = in_process("gentron-serve", serve.cli)("-m", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_an_address_that_others_reach_needs_keys_or_a_word_that_it_does_not(in_process, tmp_path):
    run = in_process("gentron-serve", serve.cli)
    refused = run("--host", "0.0.0.0")
    assert refused.returncode == 2
    assert "--api-keys FILE" in refused.stderr
    assert "--no-auth" in refused.stderr
    both = run("--no-auth", "--api-keys", tmp_path / "keys")
    assert "contradicts --api-keys" in both.stderr
    missing = run("--host", "0.0.0.0", "--api-keys", tmp_path / "keys")
    assert "cannot be read" in missing.stderr
    assert missing.returncode == 2
    for allowed in ("0.0.0.0", "::"):
        assert "was not found" in run("--host", allowed, "--no-auth", "-m", "nowhere").stderr


def test_a_key_is_printed_once_and_lets_in_until_it_is_removed(in_process):
    run = in_process("gentron-key", key.cli)
    made = run("add", "ann", "--per-minute", "60")
    secret = made.stdout.strip()
    assert made.returncode == 0
    assert Keys.read(Path("gentron-keys")).find(secret).name == "ann"
    assert secret not in Path("gentron-keys").read_text()
    assert "remove it first" in run("add", "ann").stderr
    assert "must be 1 to 63" in run("add", "../ann").stderr
    assert run("add", "bob").returncode == 0
    assert run("list").stdout == "ann\t60 a minute\nbob\n"
    assert run("remove", "ann").returncode == 0
    assert Keys.read(Path("gentron-keys")).find(secret) is None
    assert run("remove", "ann").returncode == 2


def test_a_folder_of_jobs_that_another_server_has_is_one_line(in_process, tmp_path):
    store = JobStore(tmp_path)
    done = in_process("gentron-serve", serve.cli)("--jobs", str(tmp_path))
    store.close()
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert re.search(r"another server \(process \d+\) .* another folder with --jobs$", line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end_and_takes_another_bundle(
    tiny_bundle, tiny_video_bundle, number, tmp_path
):
    """Every line that it logs is JSON, and a request's line has its name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    current = tmp_path / "current"
    current.symlink_to(tiny_bundle)
    start = "import sys; sys.argv[0] = 'gentron-serve'; from gentron.cli.serve import main; main()"
    command = [sys.executable, "-c", start, "-m", str(current), "--port", str(port)]
    command += ["--backend", "onnxruntime", "--log-format", "json", "--warm-up", "16x16"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/readyz", process)
        body = json.dumps({"prompt": "a \n walrus", "gentron": {"steps": 2, "seed": 1}}).encode()
        head = {"content-type": "application/json", "x-request-id": "mine"}
        answer = urlopen(Request(f"{url}/v1/images/generations", body, head))
        assert answer.headers["x-request-id"] == "mine"
        assert json.load(answer)["gentron"]["seeds"] == [1]
        with pytest.raises(HTTPError):
            urlopen(f"{url}/v1/models/%1b%5b31m%0a%7b%22event%22%3A%22forged%22%7D")
        current.unlink()
        current.symlink_to(tiny_video_bundle)
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 60
        while json.load(urlopen(f"{url}/v1/models"))["data"][0]["id"] != "tiny-video":
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(30) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "log").read_text()
    assert "\x1b" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    (mine,) = [line for line in lines if line.get("request_id") == "mine"]
    assert (mine["event"], mine["status"], mine["method"]) == ("request", 200, "POST")
    assert not [line for line in lines if line["event"] == "forged" or "exception" in line]
    assert [line for line in lines if line["event"].startswith("reloaded: tiny-video")]
    assert "walrus" not in text


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 90
    while True:
        assert process.poll() is None
        assert time.monotonic() < end, "waited in vain"
        try:
            if urlopen(url).status == 200:
                return
        except URLError:
            time.sleep(0.1)
