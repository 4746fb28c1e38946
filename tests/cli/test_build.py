"""`gentron-build`: engines in the cache, engines to carry elsewhere, and the cache itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from gentron.cli import build as build_command
from gentron.engines.folder import MANIFEST

Command = Callable[..., CompletedProcess[str]]
COMPONENTS = ["text_encoder", "text_encoder_2", "text_projection", "conditioner", "denoiser",
              "vae_decoder"]  # fmt: skip
RUN = ("--seed", 3, "--steps", 2, "--backend", "onnxruntime")


@pytest.fixture
def gentron_build(
    in_process: Callable[..., Command], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """On the desk, with an empty engine cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return in_process("gentron-build", build_command.cli)


@pytest.fixture
def refused(gentron_build: Command) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        done = gentron_build(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), (done.stdout, done.stderr)
        reason = done.stderr.strip().splitlines()[-1]
        assert reason.lower().startswith("error: "), done.stderr
        return reason

    return run


def engines_of(done: CompletedProcess[str]) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["engines"]


def test_a_bundle_is_built_once_listed_verified_and_pruned(gentron_build, tiny_bundle):
    first = engines_of(gentron_build(tiny_bundle, "--backend", "onnxruntime", "--json"))
    assert [engine["component"] for engine in first] == COMPONENTS
    assert all(engine["built_now"] for engine in first)
    assert all(engine["facts"]["probes"]["passed"] for engine in first)
    again = engines_of(gentron_build(tiny_bundle, "--backend", "onnxruntime", "--json"))
    assert not any(engine["built_now"] for engine in again)

    listed = engines_of(gentron_build("--list", "--json"))
    assert {e["folder"] for e in listed} == {e["folder"] for e in first}
    assert gentron_build("--list").stdout.splitlines()[-1].startswith("6 engines, 0.0")
    assert gentron_build("--verify").stdout.count("as written") == 6
    verified = json.loads(gentron_build("--verify", "--json").stdout)["engines"]
    assert [engine["problem"] for engine in verified] == [""] * 6

    engine = Path(first[4]["folder"]) / "engine.weights"
    engine.write_bytes(engine.read_bytes()[:-1])
    done = gentron_build("--verify")
    assert done.returncode == 1
    assert "engine.weights is truncated or replaced" in done.stdout
    assert "1 damaged" in done.stderr
    healed = engines_of(gentron_build(tiny_bundle, "--backend", "onnxruntime", "--json"))
    assert [e["component"] for e in healed if e["built_now"]] == ["denoiser"]

    done = gentron_build("--prune")
    assert "set aside" in done.stdout
    assert len(gentron_build("--list", "--json").stdout) > 100
    gentron_build("--prune", "--budget", 0)
    assert engines_of(gentron_build("--list", "--json")) == []


def test_one_component_in_one_precision(gentron_build, tiny_bundle):
    given = ("--backend", "onnxruntime", "--component", "denoiser", "--precision", "fp16")
    (engine,) = engines_of(gentron_build(tiny_bundle, *given, "--json"))
    assert (engine["component"], engine["key"]["precision"]) == ("denoiser", "fp16")


def test_engines_built_elsewhere_draw_the_same_picture(
    gentron_build, gentron_run, tiny_bundle, desk
):
    plain = gentron_run("image", "a cat", "-m", tiny_bundle, *RUN, "-o", "plain.png")
    assert plain.returncode == 0, plain.stderr
    done = gentron_build(tiny_bundle, "--backend", "onnxruntime", "-o", "engines", "--json")
    sha256 = json.loads(done.stdout)["sha256"]
    given = ("--engines", "engines", "--engines-sha256", sha256)
    built = gentron_run("image", "a cat", "-m", tiny_bundle, *RUN, *given, "-o", "built.png")
    assert built.returncode == 0, built.stderr
    from PIL import Image, ImageChops

    difference = ImageChops.difference(Image.open("plain.png"), Image.open("built.png"))
    assert max(high for _, high in difference.getextrema()) <= 1

    manifest = desk / "engines" / MANIFEST
    manifest.write_text(manifest.read_text() + " ")
    done = gentron_run("image", "a cat", "-m", tiny_bundle, *RUN, *given)
    assert done.returncode == 2
    assert f"{MANIFEST}: its sha256 is" in done.stderr


def test_the_line_to_use_a_folder_of_engines_is_printed(gentron_build, tiny_bundle, desk):
    done = gentron_build(
        tiny_bundle, "--backend", "onnxruntime", "--component", "conditioner", "-o", "engines"
    )
    last = done.stdout.splitlines()[-1]
    assert "--engines engines --engines-sha256 " in last
    assert (desk / "engines" / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either BUNDLE or one of --list"),
        (("emoji",), "name one of tensorrt, tensorrt-rtx"),
        (("emoji", "--list"), "either BUNDLE or one of"),
        (("--list", "--prune"), "either BUNDLE or one of"),
        (("--list", "--budget", 3), "belongs to --prune"),
        (("--prune", "--budget", "nan"), "a number of GB, got nan"),
        (("--prune", "--budget", -1), "a number of GB, got -1"),
        (("--list", "--gpu", "sm80"), "gpu: is for building"),
        (("--verify", "--profile", "samples=1"), "profile: is for building"),
        (("emoji", "--backend", "tensorrt-rtx", "--gpu", ","), "unknown GPU generation ''"),
        (("emoji", "--backend", "openvino", "--profile", "size=4096x4096"), "from 64 to 256"),
        (("emoji", "--backend", "openvino", "-o", "/proc/x/y"), "cannot be written"),
        (("emoji", "--backend", "abacus"), "'abacus' is not one of"),
        (("nowhere", "--backend", "onnxruntime"), "'nowhere' was not found"),
        (("emoji", "--backend", "onnxruntime", "--gpu", "sm80"), "leave --gpu out"),
        (("emoji", "--backend", "openvino", "--strip"), "name tensorrt with --backend"),
        (("emoji", "--backend", "tensorrt-rtx", "--strip"), "leave --strip out"),
        (("emoji", "--backend", "tensorrt-rtx", "--gpu", "sm90"), "use --backend tensorrt on that"),
        (("emoji", "--backend", "tensorrt-rtx", "--gpu", "sm1"), "sm1"),
        (("emoji", "--backend", "onnxruntime", "--precision", "bf16"), "compiles fp32 or fp16"),
        (("emoji", "--backend", "onnxruntime", "--component", "brain"), "got 'brain'"),
        (("emoji", "--backend", "onnxruntime", "--profile", "rows=x"), "not a whole number"),
    ],
)
def test_what_cannot_be_built_is_refused(refused, arguments, message):
    assert message in refused(*arguments)


def test_a_partial_bundle_names_what_it_lacks(refused, tiny_copy):
    manifest = json.loads((tiny_copy / "gentron.json").read_text())
    manifest["precisions"]["denoiser"] = []
    (tiny_copy / "gentron.json").write_text(json.dumps(manifest))
    assert "without denoiser" in refused(tiny_copy, "--backend", "onnxruntime")


def test_a_folder_that_is_in_use_is_left_alone(refused, gentron_build, tiny_bundle, desk):
    (desk / "engines").mkdir()
    (desk / "engines" / "thesis.txt").write_text("years of work\n")
    done = gentron_build(tiny_bundle, "--backend", "onnxruntime", "--component", "conditioner",
                         "-o", "engines")  # fmt: skip
    assert done.returncode == 2
    assert "not empty; name a new folder" in done.stderr
    assert (desk / "engines" / "thesis.txt").read_text() == "years of work\n"


def test_no_build_refuses_where_an_engine_is_missing(gentron_run, tiny_bundle, monkeypatch, desk):
    """ONNX Runtime needs none; OpenVINO does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(desk / "cache"))
    done = gentron_run("image", "a cat", "-m", tiny_bundle, "--steps", 1, "--backend", "openvino",
                       "--no-build")  # fmt: skip
    assert done.returncode == 2
    assert f"run: gentron-build {tiny_bundle} --backend openvino" in done.stderr
    shutil.rmtree(desk / "cache", ignore_errors=True)
