"""The measuring side of a contender: a process that is asked for times in turn with others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gentron.bench.peers import environment
from gentron.bench.work import Work
from gentron.errors import BackendError, ResourceError
from gentron.isolated import known_error


@dataclass
class Contender:
    """`command` runs `worker.serve`, `payload` is its first line. Use as a context manager."""

    name: str
    command: Sequence[str]
    payload: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)  # times in seconds of each round
    peak_bytes: int = 0
    prepare_s: float = 0.0

    @classmethod
    def of(cls, kind: str, work: Work, threads: int, log: Path) -> Contender:
        """`kind` is a backend's or a peer's name, or "machine"; peers need to know the threads."""
        command = [sys.executable, "-m", "gentron.bench.worker", kind]
        return cls(kind, command, work.to_json(), log, environment(kind, threads))

    def __enter__(self) -> Contender:
        """Starts it and waits until it has run the work once; raises what it raised."""
        with self.log.open("w") as complaints:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=self.environment,
                text=True,
            )
        try:
            ready = self._ask(self.payload)
        except BaseException:
            self._process.kill()
            self.__exit__()
            raise
        self.facts, self.prepare_s = ready["facts"], ready["prepare_s"]
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.close()  # it ends by itself
        except BrokenPipeError:
            process.kill()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def measure(self, seconds: float) -> None:
        """One round."""
        answer = self._ask(json.dumps({"seconds": seconds}))
        self.rounds.append(answer["times"])
        self.peak_bytes = answer["peak"] or 0

    def outputs(self, file: Path) -> Path:
        """Writes the outputs of the last run there."""
        self._ask(json.dumps({"outputs": str(file)}))
        return file

    def _ask(self, line: str) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._raise_ended()
        text = process.stdout.readline()
        if not text:
            self._raise_ended()
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise known_error(answer["error"], answer["text"])
        return answer

    def _raise_ended(self) -> None:
        status = self._process.wait()
        lines = self.log.read_text("utf-8", "replace").splitlines()
        if status < 0:
            raise ResourceError(
                f"{self.name}: its process was killed ({signal.Signals(-status).name}); SIGKILL is "
                "mostly the system running out of memory: close other programs, or measure less"
            )
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise BackendError(f"{self.name}: its process ended with {status}: {last.strip()[:300]}")


def in_turns(contenders: Sequence[Contender], rounds: int, seconds: float) -> None:
    """Each runs for `seconds` in every round, one after the other; who is first changes."""
    for number in range(rounds):
        turn = number % len(contenders) if contenders else 0
        for contender in (*contenders[turn:], *contenders[:turn]):
            contender.measure(seconds)
