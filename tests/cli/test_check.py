"""`gentron-check`: a line for every comparison, an exit code that says what it found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from gentron.bundle import Bundle
from gentron.cli.check import main
from gentron.probe import load_probes
from gentron.weights import stored_tensors

COMPONENTS = ("text_encoder", "text_encoder_2", "text_projection", "conditioner", "denoiser",
              "vae_decoder")  # fmt: skip
HEAVY = ("torch", "onnx", "transformers", "diffusers", "einops", "onnxscript")
Command = Callable[..., CompletedProcess[str]]
Poison = Callable[[Path, str, str], None]
Reseal = Callable[[Path], None]


@pytest.fixture
def gentron_check(
    desk: Path,
    warm: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Command:
    """`gentron_check(BUNDLE, "--json", ...)` in this process; engines of the tiny bundle stay."""

    def run(*arguments: object) -> CompletedProcess[str]:
        given = ["gentron-check", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", given)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return CompletedProcess(given, stopped.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(gentron_check: Command) -> Callable[..., str]:
    """Expects exit code 2 and nothing but one line of error, which it returns."""

    def run(*arguments: object) -> str:
        done = gentron_check(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), (done.stdout, done.stderr)
        *usage, reason = done.stderr.strip().splitlines()
        assert reason.startswith("Error: " if usage else "error: "), done.stderr
        return reason

    return run


def strict(text: str) -> Any:
    """JSON as the standard has it: without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "gentron.json").read_text("utf-8"))
    change(manifest)
    (bundle / "gentron.json").write_text(json.dumps(manifest), "utf-8")


def turn_sign(bundle: Path, folder: str, tensor: str) -> None:
    """The first value of a stored tensor gets the other sign: as finite as it was."""
    stored = stored_tensors(bundle / folder)[tensor]
    last = stored.offset + {"F16": 2, "F32": 4}[stored.dtype] - 1  # little endian
    with stored.file.open("r+b") as stream:
        stream.seek(last)
        (byte,) = stream.read(1)
        stream.seek(last)
        stream.write(bytes([byte ^ 0x80]))


def test_a_healthy_bundle_passes_with_an_aligned_line_for_every_output_and_case(
    gentron_check: Command, tiny_bundle: Path
) -> None:
    done = gentron_check(tiny_bundle)
    assert (done.returncode, done.stderr) == (0, "")
    where, header, *lines, summary = done.stdout.splitlines()
    opened = Bundle.open(tiny_bundle)
    assert str(tiny_bundle) in where
    assert opened.digest[:16] in where
    wanted = [
        (name, precision, computed, spec.name, *(f"{a}={n}" for a, n in case.sizes.items()))
        for name, component in opened.components.items()
        for precision, computed in (("fp16", "float16"), ("fp32", "float32"))
        for case, _ in load_probes(tiny_bundle / opened.manifest.probes[name])
        for spec in component.outputs
    ]
    assert sorted(tuple(line.split()[:-4]) for line in lines) == sorted(wanted)
    for line in lines:
        absolute, relative, cosine, verdict = line.split()[-4:]
        assert verdict == "PASS"
        assert float(absolute) >= 0
        assert float(relative) < 2e-2
        assert float(cosine) > 0.9999
    for word in ("PASS", "float"):
        assert len({line.index(word) for line in lines}) == 1
    assert header.split() == [
        "component", "graph", "computed", "output", "sizes", "max-abs", "relative", "cosine"
    ]  # fmt: skip
    assert summary.startswith("12 of 12 graphs agree with torch (onnxruntime ")


def test_json_holds_the_same_verdicts(gentron_check: Command, tiny_bundle: Path) -> None:
    done = gentron_check(tiny_bundle, "--json", "--precision", "fp32")
    assert (done.returncode, done.stderr) == (0, "")
    found = strict(done.stdout)
    opened = Bundle.open(tiny_bundle)
    assert (found["passed"], found["name"], found["backend"]) == (True, "tiny", "onnxruntime")
    assert found["digest"] == opened.digest
    assert [check["component"] for check in found["checks"]] == list(COMPONENTS)
    for check in found["checks"]:
        assert (check["result"], check["computed"]) == ("pass", "float32")
        assert all(a["passed"] and a["max_relative"] <= 5e-5 for a in check["agreements"])


def test_components_and_precision_choose_what_is_checked(
    gentron_check: Command, tiny_bundle: Path
) -> None:
    named = ("--component", "vae_decoder", "--component", "conditioner")
    done = gentron_check(tiny_bundle, *named, "--precision", "fp16", "--json")
    assert done.returncode == 0
    found = [(c["component"], c["precision"]) for c in strict(done.stdout)["checks"]]
    assert found == [("conditioner", "fp16"), ("vae_decoder", "fp16")]


def test_an_altered_weight_is_refused_by_its_digest_and_once_sealed_again_found_by_the_probes(
    gentron_check: Command, refused: Callable[..., str], tiny_copy: Path, reseal: Reseal
) -> None:
    turn_sign(tiny_copy, "vae", "decoder.conv_out.bias")
    assert "differ from the manifest's sha256" in refused(tiny_copy)
    reseal(tiny_copy)
    done = gentron_check(tiny_copy, "--precision", "fp32")
    assert done.returncode == 1
    _, _, *lines, summary = done.stdout.splitlines()
    verdicts = {line.split()[0]: set[str]() for line in lines}
    for line in lines:
        verdicts[line.split()[0]].add("FAIL" if "FAIL: allowed 5e-05" in line else line[-4:])
    assert verdicts.pop("vae_decoder") == {"FAIL"}
    assert set(verdicts) == set(COMPONENTS) - {"vae_decoder"}
    assert all(verdict == {"PASS"} for verdict in verdicts.values())
    assert summary.startswith("5 of 6 graphs agree with torch (onnxruntime ")
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: not what torch computes: vae_decoder fp32; ")
    assert "export it again" in error
    assert "no bundle was made" not in done.stdout + done.stderr


def test_not_a_number_fails_in_text_and_as_null_in_json(
    gentron_check: Command, tiny_copy: Path, poison: Poison
) -> None:
    poison(tiny_copy, "transformer", "conditioner.adaln.0.weight")
    chosen = (tiny_copy, "--component", "conditioner", "--precision", "fp32")
    done = gentron_check(*chosen)
    assert done.returncode == 1
    assert re.search(
        r"^conditioner .* modulation .* nan +nan +nan  FAIL", done.stdout, re.MULTILINE
    )
    done = gentron_check(*chosen, "--json")
    assert done.returncode == 1
    found = strict(done.stdout)
    assert (found["passed"], found["checks"][0]["result"]) == (False, "fail")
    by_output = {a["output"]: a["max_relative"] for a in found["checks"][0]["agreements"]}
    assert by_output["modulation"] is None
    assert by_output["final_modulation"] <= 2e-5


def test_a_graph_that_cannot_run_is_a_failure_with_a_reason(
    gentron_check: Command, tiny_copy: Path, reseal: Reseal
) -> None:
    folder = tiny_copy / "transformer"
    shutil.copyfile(folder / "conditioner.fp32.onnx", folder / "denoiser.fp32.onnx")
    reseal(tiny_copy)
    done = gentron_check(tiny_copy, "--component", "denoiser", "--component", "vae_decoder")
    assert done.returncode == 1
    assert re.search(r"^denoiser +fp32 +- +FAIL: \w+", done.stdout, re.MULTILINE)
    decoder = re.findall("^vae_decoder .*$", done.stdout, re.MULTILINE)
    assert decoder
    assert all(line.endswith("  PASS") for line in decoder)
    assert done.stderr.startswith("error: not what torch computes: denoiser fp32; ")


def test_a_precision_that_cannot_be_checked_is_said(
    gentron_check: Command, tiny_copy: Path
) -> None:
    listed = {"conditioner": ["bf16", "fp32"]}
    file = tiny_copy / "transformer" / "conditioner.bf16.onnx"
    shutil.copyfile(tiny_copy / "transformer" / "conditioner.fp32.onnx", file)
    entry = Bundle.open(tiny_copy).manifest.files["transformer/conditioner.fp32.onnx"]
    edit_manifest(
        tiny_copy,
        lambda m: (m["precisions"].update(listed),
                   m["files"].update({"transformer/conditioner.bf16.onnx": vars(entry)})),
    )  # fmt: skip
    done = gentron_check(tiny_copy, "--component", "conditioner")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^conditioner +bf16 +- +skipped: .*fp32 graph", done.stdout, re.MULTILINE)
    assert "1 of 1 graphs agree with torch, 1 skipped (onnxruntime " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        (("--component", "vae"), ("unknown component 'vae'", ", ".join(COMPONENTS))),
        (("--component", ""), ("unknown component ''", ", ".join(COMPONENTS))),
        (("--backend", "abacus"), ("unknown backend 'abacus'", "onnxruntime")),
        (("--precision", "bf16"), ("bf16", "fp32", "fp16")),
        (("--no-verify",), ("--no-verify",)),
        (("another",), ("another",)),
    ],
)
def test_what_is_unknown_is_refused_with_what_there_is(
    refused: Callable[..., str],
    tiny_bundle: Path,
    arguments: tuple[str, ...],
    reasons: tuple[str, ...],
) -> None:
    line = refused(tiny_bundle, *arguments)
    assert all(reason in line for reason in reasons), line


def test_an_unknown_bundle_is_refused(refused: Callable[..., str]) -> None:
    line = refused("nowhere")
    assert "bundle 'nowhere' was not found" in line
    assert "gentron-export" in line
    assert "BUNDLE" in refused()


def test_a_component_without_probes_is_refused_and_the_others_can_be_checked(
    gentron_check: Command, refused: Callable[..., str], tiny_copy: Path
) -> None:
    edit_manifest(tiny_copy, lambda manifest: manifest["probes"].pop("denoiser"))
    for chosen in ((), ("--component", "denoiser")):
        line = refused(tiny_copy, *chosen)
        assert f"{tiny_copy}: no golden probes for denoiser; export the bundle again" in line
        assert "--component (text_encoder, " in line
    assert gentron_check(tiny_copy, "--component", "conditioner").returncode == 0


def test_what_a_partial_bundle_lacks_is_said_and_refused_only_if_named(
    gentron_check: Command, refused: Callable[..., str], tiny_copy: Path
) -> None:
    def keep(*names: str) -> None:
        def cut(manifest: dict[str, Any]) -> None:
            for table in ("precisions", "probes"):
                manifest[table] = {name: manifest[table][name] for name in names}

        edit_manifest(tiny_copy, cut)

    keep("conditioner")
    done = gentron_check(tiny_copy)
    assert (done.returncode, done.stderr) == (0, "")
    absent = re.findall(r"^(\w+) +- +- +skipped: .* --only to check it$", done.stdout, re.MULTILINE)
    assert absent == [name for name in COMPONENTS if name != "conditioner"]
    assert "2 of 2 graphs agree with torch, 5 skipped" in done.stdout
    line = refused(tiny_copy, "--component", "conditioner", "--component", "denoiser")
    assert "denoiser" in line
    assert "export" in line
    keep()
    assert "holds no graph to check; export it without --only" in refused(tiny_copy)


def test_a_precision_that_the_bundle_lacks_is_refused(
    refused: Callable[..., str], tiny_copy: Path
) -> None:
    edit_manifest(tiny_copy, lambda manifest: manifest["precisions"].update(denoiser=["fp32"]))
    line = refused(tiny_copy, "--precision", "fp16")
    assert "denoiser has no fp16 graph, only fp32; export it again with --fp16" in line


def test_it_needs_no_torch_and_writes_nothing(
    tiny_bundle: Path,
    desk: Path,
    environment: dict[str, str],
    files_in: Callable[[Path], dict[str, bytes]],
) -> None:
    program = f"""
import sys
sys.modules |= dict.fromkeys({HEAVY!r})
sys.argv = ["gentron-check", {str(tiny_bundle)!r}, "--json"]
from gentron.cli.check import main
main()
"""
    before = files_in(tiny_bundle)
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=desk, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert strict(done.stdout)["passed"]
    assert files_in(tiny_bundle) == before
    assert files_in(desk) == {}


def test_the_packaged_bundle_passes_by_name(gentron_check: Command) -> None:
    done = gentron_check("emoji", "--component", "denoiser")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()[2:-1]
    assert lines
    assert all(line.endswith("  PASS") for line in lines)
