"""`gentron-export`: what cannot become a bundle is refused before anything is traced."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gentron.bundle import MANIFEST, NULL_TEXT, REPORT, Bundle
from gentron.export.source import from_checkpoint
from gentron.presets import PRESETS

Command = Callable[..., CompletedProcess[str]]
Refused = Callable[..., str]
FilesIn = Callable[[Path], dict[str, bytes]]
Array = np.ndarray[Any, np.dtype[Any]]

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TENSOR = "denoiser.blocks.1.mlp.up.weight"


def test_list_names_every_preset_with_what_it_is(gentron_export: Command, desk: Path) -> None:
    done = gentron_export("--list")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    for line, spec in zip(lines, PRESETS.values(), strict=True):
        assert spec.note
        assert line.endswith(spec.note)
    assert list(desk.iterdir()) == []


@pytest.mark.parametrize(
    "options", [("--fp16", "--fp32"), ("--bf16", "--fp32"), ("--fp16", "--fp32", "--bf16")]
)
def test_precisions_that_contradict_are_refused(
    export_refused: Refused, options: tuple[str, ...]
) -> None:
    line = export_refused("--model", "tiny", *options)
    assert all(option in line for option in options)
    assert "give one" in line


@pytest.mark.parametrize("options", [(), ("--model", "tiny", "--checkpoint", "folder")])
def test_exactly_one_source_is_needed(export_refused: Refused, options: tuple[str, ...]) -> None:
    assert "either --model PRESET or --checkpoint DIR" in export_refused(*options)


@pytest.mark.parametrize("name", ["g3", "", "G2"])
def test_an_unknown_preset_is_refused_with_all_of_them(export_refused: Refused, name: str) -> None:
    line = export_refused("--model", name)
    assert f"unknown preset {name!r}" in line
    assert all(preset in line for preset in PRESETS)


def test_a_model_with_weights_of_its_own_is_not_made_at_random(export_refused: Refused) -> None:
    line = export_refused("--model", "emoji")
    assert "'emoji' has weights of its own" in line
    assert "gentron-train emoji" in line
    assert "--checkpoint" in line


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_holds_something_is_refused_and_left_alone(
    export_refused: Refused, desk: Path, kind: str
) -> None:
    target = desk / "tiny"  # the default name
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work\n")
    else:
        target.write_text("years of work\n")
    line = export_refused("--model", "tiny")  # which compares all files before and after
    assert "tiny: exists and is not empty" in line


def test_a_missing_parent_folder_is_named(export_refused: Refused) -> None:
    assert "not/here: no such folder" in export_refused("--model", "tiny", "-o", "not/here/tiny")


@pytest.mark.parametrize("size", [0, -1, 999_999])
def test_a_shard_too_small_for_a_tensor_is_refused(
    export_refused: Refused, desk: Path, size: int
) -> None:
    # The checkpoint does not exist, so that nothing is exported should the size be let through.
    line = export_refused("--checkpoint", "nowhere", "--shard-size", size)
    assert "shard" in line
    assert str(size) in line


@pytest.mark.parametrize("make", [lambda folder: None, Path.mkdir, Path.touch])
def test_what_is_no_checkpoint_is_refused(
    export_refused: Refused, desk: Path, make: Callable[[Path], None]
) -> None:
    make(desk / "checkpoint")
    line = export_refused("--checkpoint", "checkpoint")
    assert line.startswith("error: checkpoint: no model_index.json")


@pytest.fixture
def checkpoint(tiny_copy: Path) -> Path:
    """The tiny bundle without what an export adds: weights, configurations, tokenizers."""
    shutil.rmtree(tiny_copy / "probes")
    for name in (MANIFEST, REPORT, NULL_TEXT):
        (tiny_copy / name).unlink()
    for graph in tiny_copy.rglob("*.onnx"):
        graph.unlink()
    return tiny_copy


@pytest.fixture
def checkpoint_refused(export_refused: Refused, checkpoint: Path) -> Refused:
    """Exports the checkpoint to ./out, which has to be refused."""
    return lambda *options: export_refused("--checkpoint", checkpoint, "-o", "out", *options)


def test_a_checkpoint_without_safetensors_is_refused(
    checkpoint_refused: Refused, checkpoint: Path
) -> None:
    for file in (checkpoint / "transformer").glob("*.safetensors"):
        file.unlink()
    line = checkpoint_refused()
    assert line == f"error: {checkpoint / 'transformer'}: no .safetensors file"


def test_pickled_weights_are_never_read(checkpoint_refused: Refused, checkpoint: Path) -> None:
    weights = checkpoint / "text_encoder/model.safetensors"
    weights.unlink()
    # Unpickling this would leave a file.
    (checkpoint / "text_encoder/pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch unpickled'\ntR."
    )
    line = checkpoint_refused()
    assert f"{checkpoint / 'text_encoder'}: no .safetensors file" in line
    assert "pickled weights are never read, convert them to safetensors" in line


def change(checkpoint: Path, **tensors: Array | None) -> None:
    """Stores other values; None removes a tensor."""
    file = checkpoint / WEIGHTS
    values = load_file(file) | tensors
    kept = {name: value for name, value in values.items() if value is not None}
    save_file(kept, file, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(checkpoint_refused: Refused, checkpoint: Path) -> None:
    change(checkpoint, **{TENSOR: None})
    assert f"missing: {TENSOR}" in checkpoint_refused()


def test_a_tensor_that_belongs_to_no_model_is_named(
    checkpoint_refused: Refused, checkpoint: Path
) -> None:
    change(checkpoint, **{"denoiser.blocks.3.mlp.up.weight": np.zeros((2, 2), np.float16)})
    line = checkpoint_refused()
    assert "not part of this model: denoiser.blocks.3.mlp.up.weight" in line


def test_a_tensor_of_another_shape_is_named_with_both_shapes(
    checkpoint_refused: Refused, checkpoint: Path
) -> None:
    change(checkpoint, **{TENSOR: np.zeros((128, 63), np.float16)})
    line = checkpoint_refused()
    assert TENSOR in line
    assert "shape [128, 63], not [128, 64]" in line


@pytest.mark.parametrize(("value", "shown"), [(1e6, "1e+06"), (-1e6, "1e+06"), (np.nan, "NaN")])
def test_a_value_that_the_stored_type_cannot_hold_is_named(
    checkpoint_refused: Refused, checkpoint: Path, value: float, shown: str
) -> None:
    large = load_file(checkpoint / WEIGHTS)[TENSOR].astype(np.float32)
    large[3, 5] = value
    change(checkpoint, **{TENSOR: large})
    line = checkpoint_refused()
    assert TENSOR in line
    assert shown in line
    if np.isfinite(value):
        assert "export with --bf16 or --fp32" in line


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (WEIGHTS, lambda data: data[:-2], "truncated inside tensor"),
        (WEIGHTS, lambda data: data[:5], "truncated"),
        (WEIGHTS, lambda data: b"PK\x03\x04" + data[4:], "not a"),
        (WEIGHTS, lambda data: data[:8] + data[8:].replace(b'"dtype"', b'"type_"', 1), "not a"),
        ("transformer/config.json", lambda data: data[:40], "not valid JSON"),
        ("transformer/config.json", lambda data: data.replace(b"qk_norm", b"qk_nrom"), "qk_nrom"),
        ("vae/config.json", lambda data: data.replace(b"AutoencoderKL", b"PathKL"), "PathKL"),
        ("tokenizer/tokenizer.json", lambda data: data[:100], "tokenizer"),
        ("text_encoder/config.json", lambda data: b"[]", "expected a JSON object"),
    ],
    ids=["cut", "cut in header", "zip", "header", "json", "field", "class", "tokenizer", "list"],
)
def test_a_damaged_file_of_a_checkpoint_is_named(
    checkpoint_refused: Refused,
    checkpoint: Path,
    name: str,
    damage: Callable[[bytes], bytes],
    reason: str,
) -> None:
    file = checkpoint / name
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    line = checkpoint_refused()
    assert reason in line
    assert file.parent.name in line


def test_a_checkpoint_gives_back_its_weights(checkpoint: Path) -> None:
    stored = load_file(checkpoint / WEIGHTS)
    origin = from_checkpoint(checkpoint)
    for tensor in origin.tensors("transformer", "F16"):
        assert np.array_equal(tensor.read().numpy(), stored[tensor.name])
    assert {tensor.name for tensor in origin.tensors("transformer", "F16")} == set(stored)


def test_a_bundle_is_a_checkpoint_too(tiny_bundle: Path, checkpoint: Path) -> None:
    assert from_checkpoint(tiny_bundle).source == from_checkpoint(checkpoint).source


def test_random_weights_stay_random_when_a_bundle_is_exported_again(tiny_bundle: Path) -> None:
    assert Bundle.open(tiny_bundle).manifest.weights == "random"
    assert from_checkpoint(tiny_bundle).weights == "random"


def test_without_torch_the_line_says_what_to_install(run_process: Command, desk: Path) -> None:
    without = "import sys; sys.modules['torch'] = None"
    export = "from gentron.cli import export, run; run.main = export.main"
    done = run_process("--model", "tiny", before=f"{without}\n{export}")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "torch" in line
    assert "pip install 'gentron[export]'" in line
    assert list(desk.iterdir()) == []


def test_build_goes_on_to_compile_what_was_exported(
    gentron_export: Command, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gentron.export

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gentron.export, "export_bundle", lambda **_: tiny_bundle)
    done = gentron_export("--model", "tiny", "--build", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tiny_bundle}\n"
    built = [line.split()[0] for line in done.stderr.splitlines() if "built in" in line]
    assert built == list(Bundle.open(tiny_bundle).components)


def test_an_export_goes_straight_into_a_triton_repository(
    gentron_export: Command, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, desk: Path
) -> None:
    import gentron.export

    def export(*, output: Path, **_: object) -> Path:
        return Path(shutil.copytree(tiny_bundle, output))

    monkeypatch.setattr(gentron.export, "export_bundle", export)
    done = gentron_export("--model", "tiny", "--triton", "models")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{Path('models/gentron')}\n"
    inside = desk / "models" / "gentron" / "1"
    assert Bundle.open(inside / "bundle").digest == Bundle.open(tiny_bundle).digest
    assert (inside / "model.py").is_file()
    assert (desk / "models" / "gentron" / "config.pbtxt").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bundle", "emoji"), "goes with --triton DIR"),
        (("--bundle", "emoji", "--triton", "m", "--model", "tiny"), "without a source to export"),
        (("--model", "tiny", "--triton", "m", "-o", "there"), "leave --output and --only out"),
    ],
)
def test_what_a_triton_repository_cannot_hold_is_refused(
    export_refused: Refused, options: tuple[str, ...], said: str
) -> None:
    assert said in export_refused(*options)


def test_shapes_without_engines_are_refused(export_refused: Refused) -> None:
    assert "add --build BACKEND" in export_refused("--model", "tiny", "--profile", "samples=1")
