"""Commands as a person runs them: in this process for speed, or as processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import click
import numpy as np
import pytest

from gentron.cli import export as export_command
from gentron.cli import run as run_module
from gentron.cli.common import run_command
from gentron.engines import Engine, Graph
from gentron.engines.onnxruntime_cpu import OnnxRuntimeBackend
from gentron.weights import stored_tensors

Command = Callable[..., CompletedProcess[str]]
SHOWN = (RuntimeWarning, UserWarning)  # Python prints these, unlike those for developers


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty current folder of the commands."""
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def kept_engines() -> Iterator[dict[object, Engine]]:
    kept: dict[object, Engine] = {}
    yield kept
    for engine in kept.values():
        type(engine).close(engine)


@pytest.fixture
def warm(
    tiny_bundle: Path, kept_engines: dict[object, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiles the engines of the shared bundle once: that is most of a short command's time."""
    compile_engine = OnnxRuntimeBackend.load

    def load(backend: OnnxRuntimeBackend, graph: Graph, precision: str) -> Engine:
        if not graph.file.is_relative_to(tiny_bundle):
            return compile_engine(backend, graph, precision)
        key = (graph.file, precision)
        if key not in kept_engines:
            kept_engines[key] = compile_engine(backend, graph, precision)
            vars(kept_engines[key])["close"] = lambda: None
        return kept_engines[key]

    monkeypatch.setattr(OnnxRuntimeBackend, "load", load)


def _in_process(
    name: str,
    command: click.Command,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Command:
    def run(*arguments: object) -> CompletedProcess[str]:
        given = [name, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", given)
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(SystemExit) as stopped:
                run_command(command)
        out, err = capfd.readouterr()
        err += "".join(f"{w.category.__name__}: {w.message}\n" for w in caught
                       if issubclass(w.category, SHOWN))  # fmt: skip
        assert isinstance(stopped.value.code, int)
        return CompletedProcess(given, stopped.value.code, out, err)

    return run


@pytest.fixture
def in_process(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str, click.Command], Command]:
    """Another command: `in_process("gentron-build", cli)`."""
    return lambda name, command: _in_process(name, command, monkeypatch, capfd)


@pytest.fixture
def gentron_run(
    desk: Path, warm: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """`gentron_run("image", "a cat", ...)` on the desk. A traceback fails the test as it is."""
    return _in_process("gentron-run", run_module.cli, monkeypatch, capfd)


@pytest.fixture
def gentron_export(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    return _in_process("gentron-export", export_command.cli, monkeypatch, capfd)


@pytest.fixture
def run_process(desk: Path) -> Command:
    """gentron-run as a process of its own; `before` is Python code that runs first."""

    def run(*arguments: object, before: str = "", **options: Any) -> CompletedProcess[str]:
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        settings |= {"cwd": desk, "timeout": 120, "text": True} | options
        command = process_command(before, *arguments)
        done: CompletedProcess[str] = subprocess.run(command, check=False, **settings)
        return done

    return run


def process_command(before: str, *arguments: object) -> list[str]:
    start = "import sys; sys.argv[0] = 'gentron-run'; from gentron.cli.run import main; main()"
    return [sys.executable, "-c", f"{before}\n{start}", *map(str, arguments)]


@pytest.fixture
def run_command_line() -> Callable[..., list[str]]:
    """The argument vector of gentron-run as a process."""
    return lambda *arguments: process_command("", *arguments)


@pytest.fixture
def process_line() -> Callable[..., list[str]]:
    """The same, after some Python code: `process_line("import time", "video", ...)`."""
    return process_command


def every_file(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def files_in() -> Callable[[Path], dict[str, bytes]]:
    """Names and contents of all files below a folder, hidden ones too."""
    return every_file


@pytest.fixture
def refused(gentron_run: Command, desk: Path) -> Callable[..., str]:
    """Runs gentron-run, expects a clean refusal, returns the line that says why."""
    return lambda *arguments: check_refusal(gentron_run, desk, *arguments)


@pytest.fixture
def export_refused(gentron_export: Command, desk: Path) -> Callable[..., str]:
    return lambda *arguments: check_refusal(gentron_export, desk, *arguments, progress=True)


def check_refusal(command: Command, desk: Path, *arguments: object, progress: bool = False) -> str:
    """Exit code 2, nothing on stdout, one line of error (or click's usage), every file as it was.

    Warnings may precede it, the backend that was chosen, and with `progress` the lines in which an
    export says what it is at.
    """
    before = every_file(desk)
    done = command(*arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert every_file(desk) == before
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if lines[0].startswith("Usage: "):
        assert lines[-1].startswith("Error: "), done.stderr
        return lines[-1]
    reason = lines.pop()
    assert reason.startswith("error: "), done.stderr
    usual = ("warning: ", "backend ")
    assert progress or all(line.startswith(usual) for line in lines), done.stderr
    return reason


@pytest.fixture
def reseal() -> Callable[[Path], None]:
    """Makes the manifest agree with the files again, as someone who means harm would."""

    def seal(bundle: Path) -> None:
        manifest = json.loads((bundle / "gentron.json").read_text("utf-8"))
        for name, entry in manifest["files"].items():
            data = (bundle / name).read_bytes()
            entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        (bundle / "gentron.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")

    return seal


@pytest.fixture
def poison(reseal: Callable[[Path], None]) -> Callable[[Path, str, str], None]:
    """Writes NaN over the first value of one stored tensor and seals the bundle again."""

    def write_nan(bundle: Path, folder: str, tensor: str) -> None:
        stored = stored_tensors(bundle / folder)[tensor]
        kind = {"F16": np.float16, "F32": np.float32}[stored.dtype]
        with stored.file.open("r+b") as stream:
            stream.seek(stored.offset)
            stream.write(np.asarray(np.nan, kind).tobytes())
        reseal(bundle)

    return write_nan


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a process of its own: nothing that changes encodings, no caches beside the source."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"}
