"""Damaged bundles and damaged requests by the thousand: everything ends, in an error of ours.

    python scripts/mutate.py --bundle BUNDLE --bundles 1000 --requests 1000

A bundle is copied, damaged in one to three places (bits, cuts, JSON values, files swapped or gone),
mostly sealed again as someone who means harm would, loaded in a process of its own and asked for a
picture. A request's body is damaged and sent to a server over HTTP. What may come of a bundle is a
picture or a GenTronError of one line; of a request, a status under 500. Anything else (a traceback,
a signal, no answer in time) is printed with its seed, kept with --keep, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import copy
import faulthandler
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY = 4 << 30  # bytes of address space that a damaged bundle may ask for
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**40, 1e308, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "a\r\nb: c", "\x1b[31m", "\x00", "\ud800", "9" * 5000),
    *([], {}, [[]], [None] * 3, {"a": {"b": []}}),
)
BODIES = (
    {"prompt": "a cat", "size": "16x16", "gentron": {"seed": 1, "steps": 2}},
    {"prompt": "a cat", "n": 2, "size": "16x16", "output_format": "jpeg",
     "output_compression": 50, "gentron": {"steps": 3, "solver": "ddim", "eta": 0.5,
     "guidance": 4.0, "guidance_interval": [0.3, 5.0], "negative": "a dog", "priority": 1}},
    {"prompt": "a dog", "size": "16x16", "stream": True, "partial_images": 1,
     "gentron": {"seed": 3, "steps": 3, "solver": "unipc", "deadline": 60}},
)  # fmt: skip


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    if not data or kind == 0:
        return data + rng.randbytes(rng.randrange(1, 40))
    at = rng.randrange(len(data))
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + rng.randrange(1, 64) :]
    if kind == 3:
        return data[:at] + rng.randbytes(rng.randrange(1, 16)) + data[at:]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(len(changed) if kind == 4 else min(len(changed), 2000))
        changed[at] = rng.choice((changed[at] ^ (1 << rng.randrange(8)), 0, 0xFF, 0x7F, 0x80))
    return bytes(changed)


def damaged_json(values: Any, rng: random.Random) -> Any:
    """One value replaced, dropped, doubled or put elsewhere."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(items):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(values)
    if not places:
        return copy.deepcopy(rng.choice(ODD))
    node, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice((str(key) + "x", "__class__", "../x", ""))] = node.pop(key)
    elif kind == 2 and isinstance(node[key], int | float):
        node[key] = rng.choice((node[key] + 1, -node[key], node[key] * 1000, node[key] / 3))
    elif kind == 3:
        other, place = rng.choice(places)
        if (isinstance(other, dict) and place in other) or (
            isinstance(other, list) and place < len(other)
        ):
            node[key] = json.loads(json.dumps(other[place]))
    else:
        node[key] = copy.deepcopy(rng.choice(ODD))
    return values


def dump(values: Any) -> bytes:
    return json.dumps(values).encode("utf-8", "surrogatepass")


def damage_bundle(folder: Path, rng: random.Random) -> list[str]:
    """In place; says what was done."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        file = rng.choice([f for f in files if f.is_file()])
        name = str(file.relative_to(folder))
        data = file.read_bytes()
        if rng.random() < 0.04:
            file.unlink()
            done.append(f"without {name}")
        elif rng.random() < 0.06:
            other = rng.choice(files)
            if other.is_file():
                file.write_bytes(other.read_bytes())
            done.append(f"{name} is {other.name}")
        elif file.suffix == ".json" and rng.random() < 0.8:
            try:
                file.write_bytes(dump(damaged_json(json.loads(data), rng)))
            except (ValueError, RecursionError):
                file.write_bytes(damaged_bytes(data, rng))
            done.append(f"values of {name}")
        else:
            file.write_bytes(damaged_bytes(data, rng))
            done.append(f"bytes of {name}")
    if rng.random() < 0.85:
        seal(folder)
    return done


def seal(folder: Path) -> None:
    """The manifest's digests are made to agree, where it can still be read."""
    manifest = folder / "gentron.json"
    try:
        values = json.loads(manifest.read_bytes())
        for name, entry in values["files"].items():
            data = (folder / name).read_bytes()
            entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return
    manifest.write_bytes(dump(values))


def draw(folder: Path) -> str:
    """Loads and draws; says how it ended. Anything that is not ours is raised."""
    from gentron.errors import GenTronError
    from gentron.runtime import Pipeline

    try:
        with Pipeline.load(folder, backend="onnxruntime") as pipe:
            pipe("a cat", seed=1, steps=2)
    except GenTronError as error:
        text = str(error)
        if not text.strip() or "\n" in text or len(text) > 2000:
            raise AssertionError(f"not one line: {text!r}") from error
        return type(error).__name__
    return "a picture"


def in_a_child(folder: Path, seconds: float) -> tuple[str, str]:
    """How it ended and, if it must not end so, details. A fork, so that starting costs nothing."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 2)
        try:
            said = draw(folder)
        except BaseException:
            said = "defect\n" + traceback.format_exc()[-3000:]
        os.write(write, said.encode("utf-8", "backslashreplace"))
        os._exit(0)
    os.close(write)
    said, end = b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            return "hang", f"nothing after {seconds:.0f} s"
        part = os.read(read, 65536)
        if not part:
            break
        said += part
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        name = signal.Signals(-status).name if status < 0 else f"exit {status}"
        return "crash", name
    outcome, _, details = said.decode("utf-8", "replace").partition("\n")
    return outcome, details


def try_bundles(options: argparse.Namespace) -> list[str]:

    wrong: list[str] = []
    ends: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        for number in range(options.first, options.first + options.bundles):
            rng = random.Random(f"{options.seed} bundle {number}")
            folder = Path(scratch) / "bundle"
            shutil.copytree(options.bundle, folder)
            done = damage_bundle(folder, rng)
            started = time.monotonic()
            outcome, details = in_a_child(folder, options.seconds)
            slowest = max(slowest, time.monotonic() - started)
            ends[outcome] += 1
            if outcome in ("defect", "crash", "hang"):
                wrong.append(f"bundle {number}: {outcome}: {'; '.join(done)}\n{details}")
                print(wrong[-1], flush=True)
                if options.keep:
                    shutil.copytree(folder, options.keep / str(number), dirs_exist_ok=True)
            shutil.rmtree(folder)
    print(f"{options.bundles} bundles: {dict(ends.most_common())}; slowest {slowest:.1f} s")
    return wrong


def damaged_body(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """Path, body, headers."""
    path = rng.choice(("/v1/images/generations", "/v1/images/generations", "/v1/videos"))
    values = json.loads(json.dumps(rng.choice(BODIES)))
    if path == "/v1/videos":
        values = {name: values[name] for name in ("prompt", "size")}
        values["gentron"] = {"frames": 2, "steps": 2}
    for _ in range(rng.choice((1, 1, 2, 3))):
        values = damaged_json(values, rng) if isinstance(values, dict) else values
    body = dump(values)
    kind = rng.choice(("application/json",) * 8 + ("text/plain", "multipart/form-data; boundary=x"))
    if rng.random() < 0.3:
        body = damaged_bytes(body, rng)
    if rng.random() < 0.03:
        deep = rng.choice((b"[", b'{"a":', b'{"prompt":[')) * 100_000
        body = deep[:120_000]
    headers = {"content-type": kind}
    if rng.random() < 0.2:
        odd = ("x" * 3000, "a b", "\x1b[31m", "../../x", "%0d%0aevil: 1", "-", "\xe4\xf6")
        name = rng.choice(("x-request-id", "authorization", "user-agent", "accept", "host"))
        headers[name] = rng.choice(odd)
    return path, body, headers


def send(port: int, path: str, body: bytes, headers: dict[str, str], seconds: float) -> int:
    """The status, 0 if the server closed without one; raises TimeoutError."""
    lines = [f"POST {path} HTTP/1.1", f"content-length: {len(body)}", "connection: close"]
    lines += [
        f"{name}: {value}" for name, value in {"host": f"127.0.0.1:{port}", **headers}.items()
    ]
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        answer = b""
        try:
            connection.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:  # an answer that came before all was sent
            pass
    head = answer.split(b" ", 2)
    return int(head[1]) if len(head) > 2 and head[0].startswith(b"HTTP/1.") else 0


def try_requests(options: argparse.Namespace) -> list[str]:
    import uvicorn

    from gentron.runtime import Pipeline
    from gentron.runtime.http_api import create_app
    from gentron.runtime.metrics import Metrics
    from gentron.runtime.service import Service

    with Pipeline.load(options.bundle, backend="onnxruntime") as pipe, socket.socket() as listening:
        app = create_app(lambda: Service(pipe), Metrics())
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=lambda: server.run([listening]))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.05)
            return send_damaged(options, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


def send_damaged(options: argparse.Namespace, port: int) -> list[str]:
    wrong: list[str] = []
    statuses: collections.Counter[int] = collections.Counter()
    slowest = 0.0
    for values in BODIES:  # undamaged they have to be right, or nothing is tried but one mistake
        headers = {"content-type": "application/json"}
        if send(port, "/v1/images/generations", dump(values), headers, options.seconds) != 200:
            wrong.append(f"undamaged, and refused: {values}")
            print(wrong[-1], flush=True)
    for number in range(options.first, options.first + options.requests):
        rng = random.Random(f"{options.seed} request {number}")
        path, body, headers = damaged_body(rng)
        started = time.monotonic()
        try:
            status = send(port, path, body, headers, options.seconds)
        except TimeoutError:
            status = -1
        slowest = max(slowest, time.monotonic() - started)
        statuses[status] += 1
        if status < 200 or (status >= 500 and status not in (503, 507)):
            wrong.append(f"request {number}: {status} for {path} {headers} {body[:300]!r}")
            print(wrong[-1], flush=True)
    if send(port, "/healthz", b"", {}, options.seconds) != 405:  # it takes no POST
        wrong.append("the server does not answer afterwards")
        print(wrong[-1])
    found = dict(sorted(statuses.items()))
    print(f"{options.requests} requests: {found}; slowest {slowest:.1f} s")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bundle", type=Path, required=True, help="a small one to damage copies of"
    )
    parser.add_argument("--bundles", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first, to repeat one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="after which it is a hang")
    parser.add_argument("--keep", type=Path, help="folder for bundles that ended badly")
    options = parser.parse_args()
    faulthandler.enable()
    wrong = try_bundles(options) if options.bundles else []
    wrong += try_requests(options) if options.requests else []
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
