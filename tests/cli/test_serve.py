"""gentron-serve as a process: it says what is missing, it serves, it ends when told to."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from gentron.cli import serve


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end(tiny_bundle, number, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import sys; sys.argv[0] = 'gentron-serve'; from gentron.cli.serve import main; main()"
    command = [sys.executable, "-c", start, "-m", str(tiny_bundle), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz", process)
        body = json.dumps({"prompt": "a cat", "gentron": {"steps": 2, "seed": 1}}).encode()
        head = {"content-type": "application/json"}
        asked = Request(f"http://127.0.0.1:{port}/v1/images/generations", body, head)
        assert json.load(urlopen(asked))["gentron"]["seeds"] == [1]
        process.send_signal(number)
        assert process.wait(30) in (0, -number, 130), (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


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
