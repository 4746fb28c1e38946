"""What cannot be done is refused: exit code 2, one line that says what to do, no file."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Command = Callable[..., CompletedProcess[str]]
Refused = Callable[..., str]
FilesIn = Callable[[Path], dict[str, bytes]]
LONG = "a" * 300  # no file system has names of this length


@pytest.fixture
def image_refused(refused: Refused, tiny_bundle: Path) -> Refused:
    """`gentron-run image` with the tiny bundle, which has to be refused."""
    return lambda *arguments: refused("image", "-m", tiny_bundle, *arguments)


@pytest.mark.parametrize(
    ("size", "advice"),
    [
        ("17x16", "multiple of 4 from 16 to 256; try 16x16"),
        ("16x18", "try 16x20"),
        ("0x0", "try 16x16"),
        ("100000x16", "try 256x16"),
        ("16x12", "try 16x16"),
        ("abc", "is not WIDTHxHEIGHT in pixels, such as 128x128"),
        ("16", "is not WIDTHxHEIGHT"),
        ("16x", "is not WIDTHxHEIGHT"),
        ("-16x16", "is not WIDTHxHEIGHT"),
        ("16.0x16", "is not WIDTHxHEIGHT"),
        ("16x16x16", "is not WIDTHxHEIGHT"),
        ("²x²", "is not WIDTHxHEIGHT"),
    ],
)
def test_a_size_that_cannot_be_done_is_refused_with_one_that_can(
    image_refused: Refused, size: str, advice: str
) -> None:
    line = image_refused("a cat", "--size", size)
    assert "size" in line
    assert size in line
    assert advice in line


@pytest.mark.parametrize("guidance", ["nan", "inf", "-inf", "1e39", "much"])
def test_guidance_must_be_a_number_that_can_be_used(image_refused: Refused, guidance: str) -> None:
    assert "guidance" in image_refused("a cat", "--guidance", guidance)


@pytest.mark.parametrize("steps", ["0", "-1", "1001", "x", "2.5"])
def test_steps_are_a_whole_number_from_one(image_refused: Refused, steps: str) -> None:
    line = image_refused("a cat", "--steps", steps)
    assert "steps" in line
    assert steps in line
    if steps.lstrip("-").isdigit():
        assert "from 1 to 1000" in line


@pytest.mark.parametrize("solver", ["heun", "", "DDIM"])
def test_an_unknown_solver_is_refused_with_the_known_ones(
    image_refused: Refused, solver: str
) -> None:
    line = image_refused("a cat", "--solver", solver)
    assert repr(solver) in line
    assert all(known in line for known in ("ddim", "ddpm", "dpm++2m", "unipc"))


def test_a_solver_that_the_model_has_no_prediction_for_is_refused(image_refused: Refused) -> None:
    line = image_refused("a cat", "--solver", "euler")
    assert line.startswith("error: solver: 'euler' is not defined for epsilon models")
    assert line.endswith("one of ddim, ddpm, dpm++2m, unipc, lcm, dmd")


@pytest.mark.parametrize("backend", ["cuda", "", "ONNXRUNTIME"])
def test_an_unknown_backend_is_refused_with_the_known_ones(
    image_refused: Refused, backend: str
) -> None:
    line = image_refused("a cat", "--backend", backend)
    assert f"unknown backend {backend!r}" in line
    assert "onnxruntime" in line


@pytest.mark.parametrize("name", ["x.jpg", "x.bmp", "x", ".png", "x.png.part"])
def test_an_unknown_suffix_is_refused_with_the_known_one(image_refused: Refused, name: str) -> None:
    line = image_refused("a cat", "-o", name)
    assert line.startswith(f"error: {name}: unknown suffix")
    assert ".png" in line.removeprefix(f"error: {name}")


@pytest.mark.parametrize("bundle", ["nowhere", "no/such/folder", "", LONG])
def test_an_unknown_bundle_is_refused(refused: Refused, bundle: str) -> None:
    line = refused("image", "a cat", "-m", bundle)
    assert f"bundle {bundle!r} was not found" in line
    assert "gentron-export" in line


def test_a_file_is_not_a_bundle(refused: Refused, tiny_bundle: Path) -> None:
    assert "not found" in refused("image", "a cat", "-m", tiny_bundle / "gentron.json")


def test_a_checkpoint_is_not_a_bundle_and_the_line_says_how_to_make_one(
    refused: Refused, tiny_copy: Path
) -> None:
    (tiny_copy / "gentron.json").unlink()
    line = refused("image", "a cat", "-m", tiny_copy)
    assert f"gentron-export --checkpoint {tiny_copy}" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch", 0),
        ("--batch", 65),
        ("--batch", -1),
        ("--batch", "x"),
        ("--seed", -1),
        ("--seed", 2**64),
        ("--seed", "x"),
        ("--precision", "fp8"),
    ],
)
def test_a_value_out_of_range_is_named(
    image_refused: Refused, option: str, value: int | str
) -> None:
    line = image_refused("a cat", option, value)
    assert option.strip("-") in line
    assert str(value) in line


def test_a_precision_that_the_backend_does_not_have_is_refused_with_those_it_has(
    image_refused: Refused,
) -> None:
    line = image_refused("a cat", "--backend", "onnxruntime", "--precision", "bf16")
    assert "onnxruntime: does not compute in bf16 on this machine; use fp32 or fp16" in line


def test_the_last_seed_of_a_batch_must_fit_too(image_refused: Refused) -> None:
    assert "seed" in image_refused("a cat", "--seed", 2**64 - 2, "--batch", 3)


@pytest.mark.parametrize("option", ["--stesp", "--cfg", "-x"])
def test_an_unknown_option_is_never_dropped(image_refused: Refused, option: str) -> None:
    assert option in image_refused("a cat", option, "4")


def test_a_missing_folder_is_refused_with_the_command_that_makes_it(
    image_refused: Refused,
) -> None:
    line = image_refused("a cat", "-o", "not/here/x.png")
    assert "not/here: no such folder" in line
    assert "mkdir -p" in line


@pytest.mark.parametrize(
    "place",
    ["note.txt/x.png", "/proc/gentron.png", f"{LONG}.png"],
    ids=["below a file", "below proc", "name too long"],
)
def test_a_place_that_cannot_be_written_is_named(
    image_refused: Refused, desk: Path, place: str
) -> None:
    (desk / "note.txt").write_text("a regular file\n")
    assert place.removesuffix("/x.png") in image_refused("a cat", "-o", place)


def test_one_file_cannot_hold_several_images(image_refused: Refused, desk: Path) -> None:
    assert "one file for 3 images" in image_refused("a cat", "--batch", 3, "-o", "x.png")
    (desk / "prompts.txt").write_text("a cat\na dog\n")
    assert "one file for 2 images" in image_refused("--prompts", "prompts.txt", "-o", "x.png")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("a cat", "--prompts", "prompts.txt"),
        ("a cat", "--like", "x.png"),
        ("--prompts", "prompts.txt", "--like", "x.png"),
    ],
)
def test_there_is_exactly_one_source_of_prompts(
    image_refused: Refused, desk: Path, arguments: tuple[str, ...]
) -> None:
    (desk / "prompts.txt").write_text("a cat\n")
    line = image_refused(*arguments)
    assert "exactly one of PROMPT, --prompts FILE, --like FILE" in line


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "holds no prompt"), (b" \n\t\n", "holds no prompt"), (b"\xff\xfe\n", "cannot be read")],
)
def test_a_file_without_prompts_is_refused(
    image_refused: Refused, desk: Path, content: bytes, reason: str
) -> None:
    (desk / "prompts.txt").write_bytes(content)
    assert f"error: prompts: prompts.txt: {reason}" in image_refused("--prompts", "prompts.txt")


@pytest.mark.parametrize("name", ["missing.txt", "folder"])
def test_a_file_of_prompts_that_cannot_be_read_is_named(
    image_refused: Refused, desk: Path, name: str
) -> None:
    (desk / "folder").mkdir()
    assert f"{name}: cannot be read" in image_refused("--prompts", name)


@pytest.mark.parametrize(
    "option",
    [("--steps", 4), ("--seed", 1), ("--size", "16x16"), ("--batch", 1), ("--negative", "")],
)
def test_like_takes_no_settings(image_refused: Refused, option: tuple[str, object]) -> None:
    line = image_refused("--like", "x.png", *option)
    assert line.startswith("error: like: ")
    assert f"drop {option[0]}" in line


def test_bytes_that_are_not_text_are_refused(
    run_process: Command, tiny_bundle: Path, desk: Path
) -> None:
    chosen = ("-m", tiny_bundle, "--backend", "onnxruntime")  # named, so that nothing is said of it
    done = run_process("image", os.fsdecode(b"caf\xe9"), *chosen)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: prompt: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(desk.iterdir()) == []


MANIFEST, VAE = "gentron.json", "vae/diffusion_pytorch_model.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "truncated": ("transformer/denoiser.fp32.onnx", lambda data: data[:-1], "truncated"),
    "swapped": ("tokenizer/tokenizer.json", lambda data: data[::-1], "swapped"),
    "one bit": (VAE, lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "damaged"),
    "missing": ("text_encoder/config.json", lambda _: b"", "missing"),
    "not a manifest": (MANIFEST, lambda data: data[:100], "not a valid manifest"),
    "path that leaves": (
        MANIFEST, lambda data: data.replace(b'"vae/config', b'"../vae/config'), "leaves the bundle"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("command", ["image", "info"])
def test_a_damaged_bundle_is_found_before_anything_runs_and_the_file_is_named(
    refused: Refused, tiny_copy: Path, kind: str, command: str
) -> None:
    name, damage, reason = DAMAGES[kind]
    file = tiny_copy / name
    before = file.read_bytes()
    after = damage(before)
    assert after != before
    if after:
        file.write_bytes(after)
    else:
        file.unlink()
    rest = ("a cat", "-m", tiny_copy) if command == "image" else (tiny_copy,)
    line = refused(command, *rest)
    assert line.startswith(f"error: {file}: ")
    assert reason in line


@pytest.mark.parametrize(
    ("folder", "tensor", "named"),
    [
        ("transformer", "denoiser.blocks.1.mlp.up.weight", "denoiser, step 1 of 4"),
        ("transformer", "conditioner.adaln.0.weight", "conditioner"),
        ("transformer", "text_projection.encoders.1.0.to_kv.weight", "text_projection"),
        ("text_encoder", "final_layer_norm.weight", "text_encoder"),
        ("text_encoder_2", "encoder.final_layer_norm.weight", "text_encoder_2"),
        ("vae", "decoder.conv_in.weight", "vae_decoder"),
    ],
)
def test_a_weight_that_is_not_a_number_stops_the_run_and_names_the_component(
    refused: Refused,
    tiny_copy: Path,
    poison: Callable[[Path, str, str], None],
    folder: str,
    tensor: str,
    named: str,
) -> None:
    poison(tiny_copy, folder, tensor)
    line = refused("image", "a cat", "-m", tiny_copy, "-o", "x.png")
    assert re.match(f"error: {named}[ ,].*produced NaN or infinity", line)


def _small_files() -> None:
    """A limit that no picture fits in: the write fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))


@pytest.mark.parametrize("output", [(), ("-o", "x.png")])
def test_a_picture_that_does_not_fit_leaves_no_file(
    run_process: Command,
    tiny_bundle: Path,
    desk: Path,
    files_in: FilesIn,
    environment: dict[str, str],
    output: tuple[str, ...],
) -> None:
    (desk / "x.png").write_bytes(b"old")
    done = run_process(
        "image", "a cat", "-m", tiny_bundle, *output, env=environment, preexec_fn=_small_files
    )
    assert (done.returncode, done.stdout) == (2, "")
    *_, error = done.stderr.splitlines()  # after warnings: random weights, digests not kept
    assert error.startswith("error: ")
    assert "cannot be written: File too large; free some space" in error
    assert files_in(desk) == {"x.png": b"old"}


@pytest.fixture
def full_disk(desk: Path) -> Iterator[Path]:
    """A disk of one page, where it may be mounted."""
    folder = desk / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=4k", "none", str(folder)]
    if not mount or subprocess.run([mount, *options], check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_leaves_no_file(
    gentron_run: Command, tiny_bundle: Path, full_disk: Path
) -> None:
    done = gentron_run("image", "a cat", "-m", tiny_bundle, "--size", "64x64", "-o", full_disk)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be written: No space left on device; free some space" in done.stderr
    assert list(full_disk.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_said(run_process: Command, tiny_bundle: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run_process("image", "a cat", "-m", tiny_bundle, "--json", stdout=full)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]


def _interruptible() -> None:
    """As in a terminal, even where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_the_middle_exits_with_130_and_leaves_no_file(
    run_command_line: Callable[..., list[str]],
    tiny_bundle: Path,
    desk: Path,
    environment: dict[str, str],
) -> None:
    ours, theirs = os.openpty()
    slow = ("--steps", 1000, "--solver", "ddim", "--size", "128x128")
    process = subprocess.Popen(
        run_command_line("image", "a cat", "-m", tiny_bundle, *slow),
        cwd=desk,
        env=environment | {"TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        preexec_fn=_interruptible,  # noqa: PLW1509  # no thread of ours runs here
    )
    os.close(theirs)
    shown, interrupted = b"", False
    (alarm := threading.Timer(120, process.kill)).start()  # should it neither draw nor stop
    with process:
        while data := _read(ours):
            shown += data
            if not interrupted and re.search(rb"\b[1-9]\d*/1000", shown):
                process.send_signal(signal.SIGINT)
                interrupted = True
        os.close(ours)
        alarm.cancel()
        assert process.wait(60) == 130, shown
        assert process.stdout is not None
        assert process.stdout.read() == b""
    done = max(int(found) for found in re.findall(rb"(\d+)/1000", shown))
    assert done < 900
    assert b"warning: interrupted" in shown
    assert b"Traceback" not in shown
    assert list(desk.iterdir()) == []


def _read(terminal: int) -> bytes:
    """b"" once the other side is closed, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""
