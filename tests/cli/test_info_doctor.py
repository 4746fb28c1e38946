"""`gentron-run info` and `doctor`, help texts, and what a command leaves on the machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import click
import pytest

import gentron
from gentron import digests
from gentron.bundle import Bundle
from gentron.engines.registry import BACKENDS
from gentron.presets import TINY

Command = Callable[..., CompletedProcess[str]]
# Python code that makes `import onnxruntime` fail, as where it is not installed or not whole.
ABSENT = "import sys; sys.modules['onnxruntime'] = None"
BROKEN = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            raise ImportError("libgomp.so.1: cannot open shared object file")
sys.meta_path.insert(0, Finder())
"""
IMAGE_OPTIONS = {"-m", "--model", "-o", "--output", "--prompts", "--like", "--steps", "--solver",
                 "--guidance", "--negative", "--seed", "--batch", "--size", "--backend",
                 "--json"}  # fmt: skip
EXPORT_OPTIONS = {"--model", "--checkpoint", "--fp16", "--fp32", "--bf16", "-o", "--output"}


@pytest.fixture
def said(gentron_run: Command) -> Callable[..., str]:
    """Standard output of a command that has to succeed without a word on stderr."""

    def run(*arguments: object) -> str:
        done = gentron_run(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_info_names_components_precisions_sizes_weights_and_digest(
    said: Callable[..., str], tiny_bundle: Path
) -> None:
    text = said("info", tiny_bundle)
    opened = Bundle.open(tiny_bundle)
    for component in opened.components:
        assert re.search(rf"^ *{component} +fp16, fp32$", text, re.MULTILINE), component
    assert re.search("^weights +random", text, re.MULTILINE)
    assert opened.digest in text
    total = sum((tiny_bundle / name).stat().st_size for name in opened.manifest.files)
    assert re.search(rf"^ *total +{total / 1e6:.1f} MB$", text, re.MULTILINE)
    assert re.search("^ *native size +16x16$", text, re.MULTILINE)
    assert re.search(r"^ *solvers +ddim, ddpm, dpm\+\+2m, unipc, lcm, dmd$", text, re.MULTILINE)


def test_info_as_json_holds_the_same_facts(said: Callable[..., str], tiny_bundle: Path) -> None:
    facts = json.loads(said("info", tiny_bundle, "--json"))
    opened = Bundle.open(tiny_bundle)
    assert facts["name"] == "tiny"
    assert facts["path"] == str(tiny_bundle)
    assert facts["digest"] == opened.digest
    assert facts["weights"].startswith("random")
    assert set(facts["components"]) == set(opened.components)
    assert set(facts["components"].values()) == {"fp16, fp32"}
    assert {"transformer", "vae", "text_encoder", "total"} <= set(facts["sizes"])
    assert facts["defaults"] == vars(TINY.defaults)
    assert facts["licences"] == {}


def test_info_names_licences_and_trained_weights(said: Callable[..., str], tiny_copy: Path) -> None:
    manifest = json.loads((tiny_copy / "gentron.json").read_text("utf-8"))
    manifest["weights"] = "trained"
    manifest["licences"] = [
        {"what": "text encoder", "licence": "Apache-2.0"},
        {"what": "pictures", "licence": "OFL-1.1"},
    ]
    (tiny_copy / "gentron.json").write_text(json.dumps(manifest), "utf-8")
    text = said("info", tiny_copy)
    assert re.search("^ *text encoder +Apache-2.0$", text, re.MULTILINE)
    assert re.search("^ *pictures +OFL-1.1$", text, re.MULTILINE)
    assert re.search("^weights +trained$", text, re.MULTILINE)
    assert "random" not in text
    facts = json.loads(said("info", tiny_copy, "--json"))
    assert facts["licences"] == {"text encoder": "Apache-2.0", "pictures": "OFL-1.1"}


def test_info_verify_finds_what_memory_hides(
    said: Callable[..., str],
    refused: Callable[..., str],
    tiny_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "SETTLED_NS", 0)  # remembers files that were written just now
    name = "transformer/diffusion_pytorch_model.safetensors"
    right = Bundle.open(tiny_copy).manifest.files[name].sha256
    assert re.search("^checked +every file, read anew$", said("info", tiny_copy, "--verify"), re.M)
    data = bytearray((tiny_copy / name).read_bytes())
    data[-1] ^= 1
    (tiny_copy / name).write_bytes(data)
    digests.remember({tiny_copy / name: right})  # as if its dates had not changed
    facts = json.loads(said("info", tiny_copy, "--json"))
    assert facts["checked"] == "every file, read where it had changed"
    for arguments in (("--verify", tiny_copy), (tiny_copy,)):  # the second knows it from the first
        reason = refused("info", *arguments)
        assert f"{name}: contents differ" in reason
        assert "copy or export it again" in reason


def test_info_shows_which_components_a_partial_bundle_has(
    said: Callable[..., str], refused: Callable[..., str], tiny_copy: Path
) -> None:
    manifest = json.loads((tiny_copy / "gentron.json").read_text("utf-8"))
    del manifest["precisions"]["vae_decoder"], manifest["precisions"]["conditioner"]
    (tiny_copy / "gentron.json").write_text(json.dumps(manifest), "utf-8")
    text = said("info", tiny_copy)
    assert re.search("^ *denoiser +fp16, fp32$", text, re.MULTILINE)
    assert re.search("^ *vae_decoder +not in it: exported with --only$", text, re.MULTILINE)
    reason = refused("image", "a cat", "-m", tiny_copy)
    assert reason.endswith("without conditioner, vae_decoder; export again without --only")


def test_info_on_nothing_says_where_bundles_come_from(refused: Callable[..., str]) -> None:
    assert "gentron-export" in refused("info", "nowhere")


def test_doctor_names_versions_and_backends(said: Callable[..., str]) -> None:
    facts = json.loads(said("doctor", "--json"))
    assert facts["gentron"] == gentron.__version__
    assert facts["python"] == platform.python_version()
    for package in ("numpy", "onnxruntime", "tokenizers"):
        assert facts["packages"][package] == importlib.metadata.version(package)
    assert set(facts["backends"]) == set(BACKENDS)
    assert facts["backends"]["onnxruntime"].startswith("usable: ")
    assert importlib.metadata.version("onnxruntime") in facts["backends"]["onnxruntime"]
    text = said("doctor")
    assert re.search("^ *onnxruntime +usable: ", text, re.MULTILINE)
    assert importlib.metadata.version("numpy") in text


@pytest.mark.parametrize("before", [ABSENT, BROKEN], ids=["absent", "broken"])
def test_doctor_says_why_a_backend_cannot_run_and_what_to_install(
    run_process: Command, before: str
) -> None:
    done = run_process("doctor", "--json", before=before)
    assert (done.returncode, done.stderr) == (0, "")
    backend = json.loads(done.stdout)["backends"]["onnxruntime"]
    assert backend.startswith("not usable: ")
    assert "pip install 'gentron[cpu]'" in backend
    if before == BROKEN:
        assert "libgomp.so.1: cannot open shared object file" in backend


def test_a_run_without_its_backend_says_what_to_install(
    run_process: Command, tiny_bundle: Path, desk: Path
) -> None:
    done = run_process("image", "a cat", "-m", tiny_bundle, before=ABSENT)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: backend onnxruntime: ")
    assert "pip install 'gentron[cpu]'" in line
    assert list(desk.iterdir()) == []


def test_a_run_writes_nothing_but_its_picture_and_the_digests_of_what_it_read(
    run_process: Command,
    tiny_bundle: Path,
    desk: Path,
    tmp_path: Path,
    environment: dict[str, str],
    files_in: Callable[[Path], dict[str, bytes]],
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    before = files_in(tiny_bundle)
    # Variables with which ONNX Runtime keeps no record of its use, and others that move caches.
    quiet = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    usual = {name: value for name, value in environment.items() if name not in quiet}
    done = run_process(
        "image", "a cat", "-m", tiny_bundle, "-o", "x.png", env=usual | {"HOME": str(home)}
    )
    assert done.returncode == 0, done.stderr
    assert set(files_in(home)) <= {f".cache/gentron/{digests.MEMORY}"}  # none for files just made
    assert list(files_in(desk)) == ["x.png"]
    assert files_in(tiny_bundle) == before


def every_command() -> Iterator[tuple[str, click.Command]]:
    """Each command line that the package installs, with its subcommands."""
    for entry in importlib.metadata.entry_points(group="console_scripts"):
        if entry.module.split(".")[0] == "gentron":
            command = importlib.import_module(entry.module).cli
            yield entry.name, command
            for name, below in getattr(command, "commands", {}).items():
                yield f"{entry.name} {name}", below


@pytest.fixture
def shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The help text of a command of `every_command`."""

    def show(name: str, flag: str) -> str:
        program, *below = name.split()
        command = dict(every_command())[program]
        assert command.main([*below, flag], program, standalone_mode=False) == 0
        return capsys.readouterr().out

    return show


def test_every_command_line_is_installed() -> None:
    names = {name for name, _ in every_command()}
    assert {
        "gentron-run image",
        "gentron-run info",
        "gentron-run doctor",
        "gentron-export",
    } <= names


def test_help_works_for_every_command_and_explains_every_option(shown: Callable[..., str]) -> None:
    for name, command in every_command():
        text = shown(name, "-h")
        assert text.startswith(f"Usage: {name} ")
        assert text == shown(name, "--help")
        for option in (p for p in command.params if isinstance(p, click.Option)):
            assert all(spelled in text for spelled in option.opts), (name, option.opts)
            assert option.help, (name, option.opts)
        assert command.help, name


def test_help_mentions_every_option_that_was_promised(shown: Callable[..., str]) -> None:
    words = set(re.findall(r"-{1,2}\w+", shown("gentron-run image", "-h")))
    assert words >= IMAGE_OPTIONS
    assert set(re.findall(r"-{1,2}\w+", shown("gentron-export", "-h"))) >= EXPORT_OPTIONS
    assert {"--json", "--verify"} <= set(re.findall(r"--\w+", shown("gentron-run info", "-h")))
    assert "--json" in shown("gentron-run doctor", "-h")


def test_help_of_image_lists_the_solvers_there_are(shown: Callable[..., str]) -> None:
    from gentron.solvers import SOLVERS

    text = shown("gentron-run image", "-h")
    assert [name for name in SOLVERS if name not in text] == []


def test_help_starts_fast_and_imports_no_engine(
    run_command_line: Callable[..., list[str]], desk: Path
) -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(run_command_line("image", "-h"), check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.5
    program = """
import sys
sys.argv = ["gentron-run", "image", "-h"]
from gentron.cli.run import main
try:
    main()
except SystemExit:
    heavy = {"onnxruntime", "torch", "transformers", "diffusers", "onnx", "openvino", "tensorrt"}
    sys.exit(f"imported {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)
sys.exit("help did not end the command")
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
