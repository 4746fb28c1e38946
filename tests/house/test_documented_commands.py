"""Every command and every piece of Python in README.md and docs/*.md: executed, or at least parsed.

`documented_commands.toml` beside this file says how each is tested, and is where to add a new one.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import importlib.util
import inspect
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("documented_commands.toml")
HOW = tomllib.loads(TABLE.read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LANGUAGES = {"sh", "python", "text", "bibtex", "json", "toml", "yaml", "ini"}


class Block(NamedTuple):
    place: str  # README.md:12
    language: str
    text: str


def blocks_of(file: Path) -> Iterator[Block]:
    text = file.read_text("utf-8")
    for found in re.finditer(r"^```([^\n]*)\n(.*?)^```[ ]*$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(f"{file.relative_to(ROOT)}:{line}", found[1].strip(), found[2])


BLOCKS = [
    block
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for block in blocks_of(file)
]


def commands_of(block: Block) -> list[str]:
    """Lines without comments; a line that ends in a backslash goes on in the next."""
    lines = block.text.replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(^|\s+)#\s.*$", "", line).strip() for line in lines)
    return [re.sub(r"\s+", " ", line) for line in stripped if line]


COMMANDS: dict[str, str] = {}  # in the documents' order: command -> where it stands first
for block in BLOCKS:
    if block.language == "sh":
        for command in commands_of(block):
            COMMANDS.setdefault(command, block.place)
PYTHON = {
    next(line for line in block.text.splitlines() if line and "import " not in line): block
    for block in reversed(BLOCKS)
    if block.language == "python"
}


# ---- parsing


class Parsed(Exception):
    """Raised in the place of what a command would do."""


def check_parses(command: str) -> None:
    """Raises for an option, file, extra or marker that is not there."""
    for part in command.split(" && "):
        words = shlex.split(part.partition(" > ")[0])
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        name = Path(words[0]).name or words[0]
        if name.startswith("gentron-"):
            parse_ours(words)
        elif name in CHECKS:
            CHECKS[name](words[1:])
        elif name.endswith(".sh"):
            subprocess.run(["bash", "-n", ROOT / words[0]], check=True)
        else:
            raise AssertionError(f"no check for {name}; add one to CHECKS in {Path(__file__).name}")


def our_command(name: str) -> click.Command:
    module = importlib.import_module(PROJECT["project"]["scripts"][name].partition(":")[0])
    return module.cli


def parse_ours(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click.Command, "invoke", lambda self, ctx: None)
        our_command(words[0]).main(words[1:], prog_name=words[0], standalone_mode=False)


def parse_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1])
        return
    script = ROOT / words[0]
    if "ArgumentParser" not in script.read_text():
        assert words[1:] == []
        compile(script.read_text(), str(script), "exec")
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        parse(parser, *given, **named)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words[1:]])
        patch.syspath_prepend(str(script.parent))
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for word in words[1:]:
        for extra in (re.findall(r"\[(.*)\]", word) or [""])[0].split(","):
            assert not extra or extra in PROJECT["project"]["optional-dependencies"], word
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()


def check_apt(words: list[str]) -> None:
    assert words[0] == "install"
    listed = (ROOT / ".ci" / "run").read_text().split()
    assert set(words[1:]) <= set(listed), "not among the packages that .ci/run installs"


def check_pytest(words: list[str]) -> None:
    markers = {
        line.partition(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]
    }
    for word in words:
        assert word == "-m" or word in markers or (ROOT / word).exists(), word


CHECKS = {
    "python": parse_python,
    "pip": check_pip,
    "apt-get": check_apt,
    "pytest": check_pytest,
    ".": lambda words: None,
}


# ---- the tests


def test_every_block_says_what_it_is():
    unknown = [block.place for block in BLOCKS if block.language not in LANGUAGES]
    assert not unknown, f"write ```sh, ```python or ```text (or another of {LANGUAGES}): {unknown}"


@pytest.mark.parametrize("kind", ["commands", "python"])
def test_every_command_has_its_line_in_the_table(kind):
    found = COMMANDS if kind == "commands" else {key: b.place for key, b in PYTHON.items()}
    missing = [f"{place}: {text}" for text, place in found.items() if text not in HOW[kind]]
    assert not missing, (
        f"say in {TABLE.relative_to(ROOT)}, under [{kind}], how these are tested:\n"
        + "\n".join(missing)
    )
    gone = [text for text in HOW[kind] if text not in found]
    assert not gone, f"no document has these any more; remove them from {TABLE.name}: {gone}"


def test_what_is_executed_elsewhere_is_there():
    for command, how in HOW["commands"].items():
        if how == "here" or how.startswith("parsed: "):
            continue
        file, _, test = how.partition("::")
        assert (ROOT / file).is_file(), f"{command}: {file} is not there"
        text = (ROOT / file).read_text()
        assert not test or f"def {test}(" in text, f"{command}: {file} has no {test}"


def test_every_command_is_taken_by_its_own_parser(capsys):
    wrong = []
    for command, place in COMMANDS.items():
        try:
            check_parses(command)
        except (AssertionError, click.ClickException, SystemExit, OSError, ValueError) as error:
            wrong.append(f"{place}: {command}\n    {error!r}")
    assert not wrong, "\n".join(wrong)
    only = {c: h for c, h in HOW["commands"].items() if h.startswith("parsed: ")}
    with capsys.disabled():
        print(f"\n{len(only)} of {len(COMMANDS)} commands of the documents are parsed only:")
        for command, how in only.items():
            print(f"  {command}\n      {how.removeprefix('parsed: ')}")


def test_an_option_that_is_not_there_is_noticed():
    for wrong in ("gentron-run image x --colour", "python benchmarks/video.py emoji --colour",
                  "pip install '.[cpus]'", "pytest -m gpu", "gentron-run paint"):  # fmt: skip
        with pytest.raises((AssertionError, click.ClickException, SystemExit)):
            check_parses(wrong)


@pytest.fixture
def folder(tmp_path, tiny_bundle, monkeypatch):
    """Where the commands run."""
    shutil.copytree(tiny_bundle, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run(folder, capfd):
    for command in COMMANDS:
        if HOW["commands"].get(command) != "here":
            continue
        words = shlex.split(command)
        if words[0] == "python":
            words = [sys.executable, str(ROOT / words[1]), *words[2:]]
            subprocess.run(words, check=True, timeout=120, stdout=subprocess.DEVNULL)
        else:
            our_command(words[0]).main(words[1:], prog_name=words[0], standalone_mode=False)
    capfd.readouterr()
    assert (folder / "again.png").read_bytes() == (folder / "apple.png").read_bytes()
    assert len(list(folder.glob("a-cat*.png"))) == 1


def test_the_python_runs(folder, tiny_pipeline, tiny_video_bundle, capfd):
    import openai
    from starlette.testclient import TestClient

    from gentron.runtime import Pipeline
    from gentron.runtime.http_api import create_app
    from gentron.runtime.metrics import Metrics
    from gentron.runtime.service import Service

    shown = []
    app = create_app(lambda: Service(tiny_pipeline), Metrics(), [(16, 16)])

    class Connected:
        """openai, whose client reaches the server without a network."""

        @staticmethod
        def OpenAI(**options: Any) -> openai.OpenAI:
            return openai.OpenAI(**options, http_client=server)

    with (
        TestClient(app, base_url="http://127.0.0.1:8000") as server,
        Pipeline.load(tiny_video_bundle) as pipe,
    ):
        for block in PYTHON.values():
            code = compile(block.text, block.place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            names: dict[str, Any] = {"openai": Connected, "pipe": pipe, "show": shown.append}
            if code.co_flags & inspect.CO_COROUTINE:
                asyncio.run(eval(code, names))
            else:
                exec(code, names)
            if "image" in names:
                assert names["image"].shape == (128, 128, 3)
            if "picture" in names:
                assert names["picture"].shape == (128, 128, 3)
    assert len(shown) == 8
    capfd.readouterr()
