"""Kills the server at random points, again and again, and looks at what became of its jobs.

    python scripts/kills.py [BUNDLE] [--kills 50] [--backend NAME] [--steps 12] [--frames 2]
                            [--seed 0] [--folder FOLDER]

Each round starts `gentron-serve --jobs FOLDER`, posts videos and pictures as jobs, and ends the
process with SIGKILL at a random time: while it starts, takes a job, draws, writes. A POST whose
answer did not come is sent again in a later round with its `Idempotency-Key`. After the last kill
the server may finish. Then

- every job that was accepted, and no other, has completed, in exactly one of its attempts;
- every file, also those that were there after one of the kills, has the bytes that the pipeline
  gives for the job's settings without a server, and nothing else is left in the folder.

Samples run one at a time (`--max-samples 1`), so that results are those of a lone pipeline to the
last bit. Ends with 1 and what was wrong if anything was.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gentron.runtime import Pipeline
from gentron.runtime.job_database import DATABASE
from gentron.runtime.job_output import output_files
from gentron.runtime.job_rows import as_job
from gentron.runtime.jobs import COMPLETED

SERVER = "import sys; sys.argv[0] = 'gentron-serve'; from gentron.cli.serve import main; main()"
FIRST = 2  # jobs that the first start completes; later ones are killed within that time
WAITING = 4  # unfinished jobs, over which no more are posted
PATIENCE = 600.0  # seconds for what is left after the last kill
GONE = (ConnectionError, http.client.HTTPException, TimeoutError)


@dataclass
class Run:
    """What a client knows: what it wants, and what it was told."""

    options: argparse.Namespace
    folder: Path
    random: random.Random
    port: int = 0
    wanted: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)  # path, body, key
    accepted: dict[str, str] = field(default_factory=dict)  # key -> id
    tries: int = 0  # POSTs
    seen: dict[tuple[str, str], str] = field(default_factory=dict)  # id, file -> its sha256
    wrong: list[str] = field(default_factory=list)

    def server(self) -> subprocess.Popen[bytes]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["--port", self.port, "--jobs", self.folder, "--max-samples", 1]
        options += ["--job-attempts", 1000]  # a job may well be under way in many of the kills
        options += ["-m", self.options.bundle] if self.options.bundle else []
        options += ["--backend", self.options.backend] if self.options.backend else []
        with (self.folder.parent / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", SERVER, *map(str, options)], stdout=log, stderr=log
            )

    def ask(self, method: str, path: str, body: Any = None, key: str = "") -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            head = {"content-type": "application/json"} | ({"Idempotency-Key": key} if key else {})
            connection.request(method, path, json.dumps(body) if body else None, head)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {content[:500]!r}")
            return json.loads(content)
        finally:
            connection.close()

    def new_job(self) -> tuple[str, dict[str, Any], str]:
        number, steps = len(self.wanted), self.random.randint(2, self.options.steps)
        own: dict[str, Any] = {"steps": steps, "seed": number}
        body: dict[str, Any] = {"prompt": f"{number} red apples", "gentron": own}
        if self.random.random() < 0.5:
            own |= {"frames": self.options.frames, "fps": 4}
            path = "/v1/videos"
        else:
            body["output_format"] = self.random.choice(["png", "jpeg", "webp"])
            own["job"] = True
            path = "/v1/images/generations"
        return path, body, f"key-{number}"

    def open(self) -> list[tuple[str, dict[str, Any], str]]:
        """What is wanted and not accepted, as far as the client knows."""
        return [wanted for wanted in self.wanted if wanted[2] not in self.accepted]

    def post_one(self) -> None:
        """One that is not accepted yet, or a new one."""
        if not self.open():
            self.wanted.append(self.new_job())
        path, body, key = self.open()[0]
        self.tries += 1
        self.accepted[key] = self.ask("POST", path, body, key)["id"]

    def unfinished(self) -> int:
        jobs = [
            job
            for kind in ("videos", "images")
            for job in self.ask("GET", f"/v1/{kind}?limit=100")["data"]
        ]
        return sum(job["status"] in ("queued", "in_progress") for job in jobs)

    def up(self, process: subprocess.Popen[bytes]) -> bool:
        try:
            self.ask("GET", "/healthz")
        except GONE:
            if process.poll() not in (None, -signal.SIGKILL):
                raise SystemExit(f"the server ended: see {self.folder.parent / 'log'}") from None
            time.sleep(0.02)
            return False
        return True

    def look(self) -> None:
        """At the files as a killed process left them."""
        results = self.folder / "results"
        for file in results.glob("*/*") if results.is_dir() else ():
            if file.parent.name.startswith("."):
                continue
            name, found = (file.parent.name, file.name), digest(file.read_bytes())
            if self.seen.setdefault(name, found) != found:
                self.wrong.append(f"{file}: changed after it was there")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def one_round(run: Run, delay: float | None) -> tuple[float | None, float]:
    """Starts the server, posts, kills it `delay` seconds after its start, or when it has completed
    `FIRST` jobs. Returns the seconds until it answered, if it did, and until it was killed."""
    started, answered = time.monotonic(), None
    process = run.server()
    timer = threading.Timer(PATIENCE if delay is None else delay, process.kill)
    try:
        timer.start()
        while process.poll() is None and not run.up(process):
            pass
        while process.poll() is None:
            answered = answered or time.monotonic() - started
            if (waiting := run.unfinished()) < WAITING:
                run.post_one()
            if delay is None and len(run.accepted) - waiting > FIRST:
                break
            time.sleep(run.random.uniform(0, 0.1))
    except GONE:
        pass
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        run.look()
    return answered, time.monotonic() - started


def finish(run: Run) -> None:
    """No more kills: every POST gets its answer, every job its end; SIGTERM."""
    process = run.server()
    try:
        while not run.up(process):
            pass
        while run.open():
            run.post_one()
        end = time.monotonic() + PATIENCE
        while left := run.unfinished():
            if time.monotonic() > end:
                run.wrong.append(f"{left} jobs did not end in {PATIENCE:.0f} s")
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    run.look()


def examine(run: Run) -> tuple[int, int]:
    """Everything against what the pipeline gives; returns jobs that ended once with the right
    files, and attempts that were interrupted."""
    database = sqlite3.connect(run.folder / DATABASE)
    database.row_factory = sqlite3.Row
    jobs = [as_job(row) for row in database.execute("SELECT * FROM jobs")]
    attempts = [dict(row) for row in database.execute("SELECT * FROM attempts")]
    database.close()
    wrong, right = run.wrong, 0
    if {job.id for job in jobs} != set(run.accepted.values()):
        wrong.append(f"{len(run.accepted)} jobs were accepted, {len(jobs)} are in the database")
    if {id for id, _ in run.seen} - {job.id for job in jobs}:
        wrong.append("files of jobs that are not in the database")
    bundle = run.options.bundle or "emoji"
    with Pipeline.load(bundle, backend=run.options.backend) as pipeline:
        for job in jobs:
            outcomes = [row["outcome"] for row in attempts if row["job"] == job.id]
            generation = pipeline.generate(job.request())
            for _ in generation:
                pass
            result = generation.result()
            files = {str(k): digest(content) for k, content in enumerate(output_files(result, job))}
            found = {name: value for (id, name), value in run.seen.items() if id == job.id}
            if job.status != COMPLETED or outcomes.count(COMPLETED) != 1:
                wrong.append(f"{job.id}: {job.status} {job.error}, attempts {outcomes}")
            elif files != found:
                wrong.append(f"{job.id}: not the files that the pipeline gives")
            else:
                right += 1
    names = {path.name for path in (run.folder / "results").iterdir()}
    if names != {job.id for job in jobs}:
        wrong.append(f"left in the folder: {names - {job.id for job in jobs}}")
    return right, sum(row["outcome"] == "interrupted" for row in attempts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=12, help="of a job, at most")
    parser.add_argument("--frames", type=int, default=2, help="of a video")
    parser.add_argument("--backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of the jobs [a temporary one]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gentron-kills-") as temporary:
        folder = options.folder or Path(temporary) / "jobs"
        folder.parent.mkdir(parents=True, exist_ok=True)
        run = Run(options, folder, random.Random(options.seed))
        longest, early = one_round(run, None)[1], 0
        for _ in range(options.kills - 1):
            early += one_round(run, run.random.uniform(0.1, longest))[0] is None
        finish(run)
        right, interrupted = examine(run)
        print(
            f"{options.kills} kills, {early} of them before the server answered: "
            f"{len(run.accepted)} jobs accepted, {right} completed once with the right bytes; "
            f"{interrupted} attempts interrupted, {run.tries - len(run.accepted)} POSTs sent "
            f"again, {len(run.seen)} files looked at"
        )
    for line in run.wrong:
        print(f"wrong: {line}", file=sys.stderr)
    sys.exit(1 if run.wrong or right != len(run.accepted) else 0)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    main()
