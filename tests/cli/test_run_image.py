"""`gentron-run image`: a prompt becomes PNG files that say how they were made."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gentron.contract import contract
from gentron.presets import TINY
from gentron.runtime.image_file import encode_png, read_metadata

Command = Callable[..., CompletedProcess[str]]
STAGES = {"text", "condition", "denoise", "decode"}


@pytest.fixture
def draw(gentron_run: Command, tiny_bundle: Path) -> Command:
    """`gentron-run image` with the tiny bundle, which has to succeed."""

    def run(*arguments: object) -> CompletedProcess[str]:
        done = gentron_run("image", "-m", tiny_bundle, *arguments)
        assert done.returncode == 0, done.stderr
        return done

    return run


def pixels(file: Path | str) -> np.ndarray[Any, np.dtype[np.int16]]:
    """[H, W, 3], in a type whose differences do not wrap."""
    with Image.open(file) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture, np.int16)


def test_a_prompt_becomes_a_png_of_the_native_size_and_its_path_is_printed(
    draw: Command, desk: Path
) -> None:
    done = draw("a cat", "--seed", 7)
    printed = Path(done.stdout.rstrip("\n"))
    assert [file.name for file in desk.iterdir()] == [printed.name]
    drawn = pixels(desk / printed)
    assert drawn.shape == (16, 16, 3)
    assert drawn.std() > 1  # a picture, not one colour


def test_the_size_is_width_times_height(draw: Command) -> None:
    draw("a cat", "--size", "32x20", "-o", "wide.png")
    with Image.open("wide.png") as picture:
        assert picture.size == (32, 20)


def test_without_an_output_the_name_is_made_of_prompt_and_seed_and_never_overwrites(
    draw: Command, desk: Path
) -> None:
    draw("A cat, reading!", "--seed", 7)
    (first,) = desk.iterdir()
    assert first.name == "a-cat-reading-7.png"
    kept = first.read_bytes()
    draw("a cat reading", "--seed", 7, "--steps", 2)
    assert first.read_bytes() == kept
    (second,) = set(desk.iterdir()) - {first}
    assert second.name == "a-cat-reading-7-2.png"
    assert read_metadata(second)["steps"] == 2


def test_a_file_that_is_named_is_replaced(draw: Command, desk: Path) -> None:
    (desk / "out.png").write_bytes(b"old")
    done = draw("a cat", "-o", "out.png")
    assert done.stdout == "out.png\n"
    assert pixels("out.png").shape == (16, 16, 3)
    assert [file.name for file in desk.iterdir()] == ["out.png"]


def test_a_folder_receives_files_that_are_named_for_it(draw: Command, desk: Path) -> None:
    (desk / "album").mkdir()
    done = draw("a cat", "--seed", 7, "-o", "album")
    assert done.stdout == "album/a-cat-7.png\n"
    assert pixels("album/a-cat-7.png").shape == (16, 16, 3)


def test_a_batch_of_three_has_three_seeds_and_each_row_is_its_own_single_image(
    draw: Command,
) -> None:
    done = draw("a cat", "--seed", 40, "--batch", 3)
    files = done.stdout.splitlines()
    assert files == ["a-cat-40.png", "a-cat-41.png", "a-cat-42.png"]
    for row, file in enumerate(files):
        stored = read_metadata(Path(file))
        assert (stored["row"], stored["row_seed"], stored["seed"]) == (row, 40 + row, 40)
        draw("a cat", "--seed", 40 + row, "-o", "single.png")
        assert np.abs(pixels(file) - pixels("single.png")).max() <= 1
    assert np.abs(pixels(files[0]) - pixels(files[1])).max() > 1


def test_a_file_of_prompts_gives_one_image_a_line(draw: Command, desk: Path) -> None:
    (desk / "prompts.txt").write_text("a cat\n\n  ein Hund \r\nдым\n", "utf-8")
    done = draw("--prompts", "prompts.txt", "--seed", 3)
    files = done.stdout.splitlines()
    assert files == ["a-cat-3.png", "ein-hund-3.png", "дым-3.png"]
    prompts = [read_metadata(Path(file))["prompt"] for file in files]
    assert prompts == ["a cat", "ein Hund", "дым"]


def test_a_file_of_prompts_from_windows_gives_the_same_prompts(draw: Command, desk: Path) -> None:
    (desk / "prompts.txt").write_text("a cat\r\na dog\r\n", "utf-8-sig")
    files = draw("--prompts", "prompts.txt").stdout.splitlines()
    assert [read_metadata(Path(file))["prompt"] for file in files] == ["a cat", "a dog"]


def test_json_is_one_object_a_line_with_stages_and_engines(draw: Command) -> None:
    done = draw("a cat", "--seed", 9, "--batch", 2, "--steps", 3, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["row_seed"] for line in lines] == [9, 10]
    components = set(contract(TINY.transformer, 2))
    for line in lines:
        assert pixels(line["file"]).shape == (16, 16, 3)
        assert set(line["stages"]) == STAGES
        assert line["stages"]["denoise"]["calls"] == 3
        assert all(stage["seconds"] > 0 for stage in line["stages"].values())
        assert set(line["engines"]) == components
        for engine in line["engines"].values():
            assert (engine["backend"], engine["device"]) == ("onnxruntime", "cpu")
            assert engine["precision"] == "float32"
        assert any("random" in warning for warning in line["warnings"])


def test_a_precision_that_is_asked_for_is_the_one_that_runs(draw: Command) -> None:
    (line,) = draw("a cat", "--precision", "fp16", "--json").stdout.splitlines()
    found = {name: engine["precision"] for name, engine in json.loads(line)["engines"].items()}
    assert found.pop("vae_decoder") == "float32"  # its own setting, and safe unless asked for
    assert set(found.values()) == {"float16"}


def test_the_picture_carries_every_setting_it_was_made_with(
    draw: Command, tiny_bundle: Path
) -> None:
    draw("a cat", "--negative", "a dog", "--seed", 9, "--steps", 3, "--solver", "ddpm",
         "--guidance", 2.5, "--size", "20x16", "-o", "out.png")  # fmt: skip
    stored = read_metadata(Path("out.png"))
    asked = {"prompt": "a cat", "negative": "a dog", "seed": 9, "steps": 3, "solver": "ddpm",
             "guidance": 2.5, "width": 20, "height": 16, "batch": 1, "row": 0}  # fmt: skip
    assert stored | asked == stored
    assert {"gentron", "numpy", "machine", "engines", "weights"} <= set(stored)
    assert re.fullmatch("[0-9a-f]{64}", stored["digest"])


@pytest.mark.parametrize(
    "option",
    [
        ("--steps", 3),
        ("--solver", "ddim"),
        ("--guidance", 1.0),
        ("--negative", "a dog"),
        ("--seed", 8),
    ],
    ids=lambda option: option[0],
)
def test_every_setting_reaches_the_picture(draw: Command, option: tuple[str, object]) -> None:
    draw("a cat", "--seed", 7, "-o", "base.png")
    draw("a cat", "--seed", 7, *option, "-o", "other.png")
    assert np.abs(pixels("base.png") - pixels("other.png")).max() > 0


def test_two_runs_with_one_seed_are_identical(draw: Command) -> None:
    for name in ("one.png", "two.png"):
        draw("a cat", "--seed", 7, "--solver", "ddpm", "-o", name)
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_without_a_seed_each_run_draws_one_and_records_it(draw: Command) -> None:
    seeds = []
    for name in ("one.png", "two.png"):
        draw("a cat", "-o", name)
        seeds.append(read_metadata(Path(name))["seed"])
    assert seeds[0] != seeds[1]
    draw("a cat", "--seed", seeds[0], "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("one.png").read_bytes()


def test_large_seeds_are_told_apart(draw: Command) -> None:
    for seed in (2**64 - 2, 2**64 - 1):
        done = draw("a cat", "--seed", seed, "-o", f"{seed}.png")
        assert "RuntimeWarning" not in done.stderr
    assert np.abs(pixels(f"{2**64 - 2}.png") - pixels(f"{2**64 - 1}.png")).max() > 0


@pytest.mark.parametrize(
    "prompt",
    [
        "кошка читает газету",
        "新聞を読む猫",
        "قطة تقرأ",
        "🐱📰",
        "",
        "../../x",
        "/etc/passwd",
        "..\\..\\x",
        "a\nb\r\nc\td",
        "-rf *; $(touch x) `x` | & > 'x' \"x\"",
        "CON: a cat?",
        "cat " * 100,
        "猫" * 100,
        "\U00020000" * 100,  # four bytes each in UTF-8
    ],
    ids=lambda prompt: ascii(prompt[:8]),
)
def test_any_prompt_gives_a_safe_file_name_inside_the_folder(
    draw: Command, desk: Path, prompt: str
) -> None:
    draw("--seed", 2**64 - 1, "--steps", 1, "--", prompt)
    (file,) = desk.iterdir()  # one file, and it is here
    assert list(desk.parent.glob("*.png")) == []
    assert re.fullmatch(r"[\w-]+\.png", file.name)
    assert not file.name.startswith(("-", "."))
    assert file.name.endswith(f"-{2**64 - 1}.png")
    assert read_metadata(file)["prompt"] == prompt


def test_letters_of_any_script_stay_in_the_name(draw: Command) -> None:
    assert draw("Кошка 猫", "--seed", 1).stdout == "кошка-猫-1.png\n"


def test_a_prompt_that_is_too_long_says_which_words_were_lost(draw: Command) -> None:
    kept = draw("a cat", "--seed", 1)
    assert "cut off" not in kept.stderr
    # A byte is a token of this bundle's stand-in; 16 less begin and end leave 14 bytes.
    done = draw("twelve bytes, then the newspaper", "--seed", 1)
    (line,) = (line for line in done.stderr.splitlines() if "cut off" in line)
    assert line.startswith("warning: prompt: ")
    assert "'then the newspaper'" in line
    assert "twelve" not in line


def test_a_negative_prompt_that_is_too_long_is_named_as_such(draw: Command) -> None:
    done = draw("a cat", "--negative", "twelve bytes, then the newspaper")
    assert re.search("^warning: negative: .*then the newspaper", done.stderr, re.MULTILINE)


def test_random_weights_are_said_on_stderr(draw: Command) -> None:
    done = draw("a cat")
    assert re.search("^warning: .*weights.* random", done.stderr, re.MULTILINE)
    assert "random" not in done.stdout


def test_names_print_on_a_terminal_that_lacks_the_letters(
    run_process: Command, tiny_bundle: Path, desk: Path, environment: dict[str, str]
) -> None:
    latin = environment | {"PYTHONIOENCODING": "cp1252"}
    done = run_process(
        "image", "кошка", "-m", tiny_bundle, "--seed", 1, env=latin, encoding="cp1252"
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert [file.name for file in desk.iterdir()] == ["кошка-1.png"]


def edit(source: Path, target: Path, **changes: object) -> None:
    """The same picture with other metadata, as an editor or another machine would leave it."""
    metadata = read_metadata(source) | changes
    target.write_bytes(encode_png(pixels(source).astype(np.uint8), metadata))


def test_like_makes_a_picture_again_bit_for_bit(draw: Command) -> None:
    draw("кошка 🐱", "--negative", "a dog", "--seed", 11, "--steps", 5, "--solver", "ddpm",
         "--guidance", 3.5, "--guidance-interval", "0.3,5", "--size", "20x16",
         "-o", "first.png")  # fmt: skip
    done = draw("--like", "first.png", "-o", "again.png")
    assert "cannot promise" not in done.stderr
    assert np.array_equal(pixels("first.png"), pixels("again.png"))
    assert read_metadata(Path("first.png")) == read_metadata(Path("again.png"))
    assert read_metadata(Path("first.png"))["guidance_interval"] == [0.3, 5.0]


def test_like_makes_one_row_of_a_batch_again_bit_for_bit(draw: Command, desk: Path) -> None:
    files = draw("a cat", "--seed", 20, "--batch", 2).stdout.splitlines()
    done = draw("--like", files[1], "-o", "again.png")
    assert "cannot promise" not in done.stderr
    assert len(list(desk.iterdir())) == 3  # the other row is not written again
    assert np.array_equal(pixels(files[1]), pixels("again.png"))
    assert read_metadata(Path(files[1])) == read_metadata(Path("again.png"))


def test_like_never_overwrites_the_picture_it_repeats(draw: Command) -> None:
    first = draw("a cat", "--seed", 7).stdout.strip()
    again = draw("--like", first).stdout.strip()
    assert again == "a-cat-7-2.png"


def test_like_finds_backend_and_precision_in_the_picture(draw: Command) -> None:
    draw("a cat", "--precision", "fp16", "-o", "first.png")
    done = draw("--like", "first.png", "-o", "again.png")
    assert "cannot promise" not in done.stderr
    assert read_metadata(Path("first.png")) == read_metadata(Path("again.png"))


@pytest.mark.parametrize(
    ("field", "before", "reason"),
    [
        ("digest", "0" * 64, "bundle digest was 0000"),
        ("machine", "x86_64 Abacus 9000", "machine was x86_64 Abacus 9000"),
        ("gentron", "0.0.1", "gentron was 0.0.1"),
        ("numpy", "1.0", "numpy was 1.0"),
    ],
)
def test_like_says_when_it_cannot_promise_the_same_bits_and_why(
    draw: Command, desk: Path, field: str, before: str, reason: str
) -> None:
    draw("a cat", "-o", "first.png")
    edit(desk / "first.png", desk / "edited.png", **{field: before})
    done = draw("--like", "edited.png", "-o", "again.png")
    (line,) = (line for line in done.stderr.splitlines() if "cannot promise" in line)
    assert line.startswith("warning: ")
    assert "same bits" in line
    assert reason in line
    assert np.array_equal(pixels("first.png"), pixels("again.png"))


def test_like_says_that_an_engine_is_another(draw: Command, desk: Path) -> None:
    draw("a cat", "-o", "first.png")
    engines = read_metadata(desk / "first.png")["engines"]
    engines["vae_decoder"] |= {"version": "0.9.9"}
    edit(desk / "first.png", desk / "edited.png", engines=engines)
    done = draw("--like", "edited.png", "-o", "again.png")
    (line,) = (line for line in done.stderr.splitlines() if "cannot promise" in line)
    assert "vae_decoder ran on onnxruntime cpu float32 0.9.9, now" in line
    other = draw("--like", "first.png", "--precision", "fp16", "-o", "again.png")
    assert "denoiser ran on onnxruntime cpu float32" in other.stderr


def bomb() -> bytes:
    """A PNG of a few bytes that claims 100000 x 100000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["foreign", "text", "cut", "bomb", "missing", "folder"])
def test_like_refuses_what_is_not_one_of_its_pictures(
    draw: Command, refused: Callable[..., str], tiny_bundle: Path, desk: Path, kind: str
) -> None:
    file = desk / f"{kind}.png"
    if kind == "foreign":
        Image.new("RGB", (16, 16)).save(file)
    elif kind == "text":
        file.write_text("a cat\n")
    elif kind == "cut":
        draw("a cat", "-o", file)
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "bomb":
        file.write_bytes(bomb())
    elif kind == "folder":
        file.mkdir()
    line = refused("image", "--like", file, "-m", tiny_bundle)
    assert line.startswith(f"error: like: {file}: ")
    expected = {"foreign": "carries no settings", "missing": "no such file"}
    assert expected.get(kind, "not a readable PNG") in line


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("row", 5),
        ("steps", "4"),
        ("width", 16.0),
        ("prompt", None),
        ("engines", []),
        ("engines", None),
        ("engines", {"denoiser": "cpu"}),
        ("engines", {"denoiser": {"backend": "onnxruntime", "precision": ["float32"]}}),
        ("engines", {"vae_decoder": {"backend": 1}}),
    ],
)
def test_like_names_a_setting_that_makes_no_sense(
    draw: Command,
    refused: Callable[..., str],
    tiny_bundle: Path,
    desk: Path,
    field: str,
    value: object,
) -> None:
    draw("a cat", "-o", "first.png")
    edit(desk / "first.png", desk / "edited.png", **{field: value})
    line = refused("image", "--like", "edited.png", "-m", tiny_bundle, "-o", "again.png")
    assert line.startswith("error: like: ")
    assert field in line
