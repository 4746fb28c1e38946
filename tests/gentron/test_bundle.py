"""Opening bundles: whatever was cut, flipped, swapped, edited or moved is found and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import gentron.bundle
from gentron.bundle import FORMAT, MANIFEST, REPORT, Bundle, Manifest, locate, sha256_file
from gentron.digests import remember
from gentron.errors import BundleError, RequestError
from gentron.runtime import Pipeline

Values = dict[str, Any]
FILES = (
    "transformer/denoiser.fp32.onnx",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/config.json",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
    "probes/denoiser.safetensors",
)


def manifest_of(folder: Path) -> Values:
    values: Values = json.loads((folder / MANIFEST).read_text("utf-8"))
    return values


def edit(folder: Path, change: Callable[[Values], Any]) -> None:
    values = manifest_of(folder)
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values), "utf-8")


def seal(folder: Path, name: str) -> None:
    """Writes a file's new size and digest into the manifest, as a careful editor would."""
    new = {"sha256": sha256_file(folder / name), "size": (folder / name).stat().st_size}
    edit(folder, lambda values: values["files"].update({name: new}))


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if anything is loaded into an engine."""

    def session(*_: object, **__: object) -> None:
        pytest.fail("an engine was made")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)


# --- a bundle as it should be ---


def test_a_bundle_opens_with_what_its_files_say(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.manifest.name == "tiny"
    assert bundle.manifest.weights == "random"
    assert bundle.native_size == (16, 16)
    assert bundle.vae_factor == 2
    assert bundle.schedule.prediction == "epsilon"
    for component, precisions in bundle.manifest.precisions.items():
        for precision in precisions:
            assert bundle.graph(component, precision).is_file()


def test_every_file_but_the_manifest_and_the_measurements_has_a_digest(tiny_bundle: Path) -> None:
    there = {
        file.relative_to(tiny_bundle).as_posix()
        for file in tiny_bundle.rglob("*")
        if file.is_file()
    }
    assert there - {MANIFEST, REPORT} == set(Bundle.open(tiny_bundle).manifest.files)


def test_a_manifest_is_the_same_after_json(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    again = Manifest.from_json(manifest.to_json(), Path("gentron.json"))
    assert again == manifest
    assert again.to_json() == manifest.to_json()


def test_a_moved_bundle_opens_and_is_the_same(tiny_copy: Path, tiny_bundle: Path) -> None:
    moved = tiny_copy.rename(tiny_copy.with_name("elsewhere and — renamed"))
    bundle = Bundle.open(moved)
    assert bundle.path == moved
    assert bundle.digest == Bundle.open(tiny_bundle).digest


def test_measurements_are_outside_the_digest(tiny_copy: Path) -> None:
    before = Bundle.open(tiny_copy).digest
    (tiny_copy / REPORT).write_text("{}")
    assert Bundle.open(tiny_copy).digest == before


def test_a_precision_without_a_graph_is_refused_with_those_there_are(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"denoiser has no bf16 graph, only fp16, fp32; .*--bf16"):
        Bundle.open(tiny_bundle).graph("denoiser", "bf16")


# --- damaged files ---


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"bytes, the manifest says \d+: truncated"),
    "flipped": (flip_a_bit, "contents differ from the manifest's sha256"),
    "missing": (Path.unlink, "missing from the bundle"),
    "a folder": (replace_by_folder, "missing from the bundle"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage_file", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named_before_anything_runs(
    tiny_copy: Path, no_engines: None, name: str, damage_file: Callable[..., None], message: str
) -> None:
    damage_file(tiny_copy / name)
    with pytest.raises(BundleError, match=message) as caught:
        Pipeline.load(tiny_copy)
    assert str(tiny_copy / name) in str(caught.value)


SWAPS = [
    ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"),
    ("transformer/denoiser.fp16.onnx", "transformer/denoiser.fp32.onnx"),
    ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
]


@pytest.mark.parametrize(("one", "other"), SWAPS)
@pytest.mark.parametrize("padded", [False, True])
def test_two_swapped_files_are_named_even_if_their_sizes_agree(
    tiny_copy: Path, no_engines: None, one: str, other: str, padded: bool
) -> None:
    if padded:  # equal sizes, so that only the digest can tell
        size = max((tiny_copy / name).stat().st_size for name in (one, other))
        for name in (one, other):
            file = tiny_copy / name
            file.write_bytes(file.read_bytes().ljust(size))
            seal(tiny_copy, name)
        Bundle.open(tiny_copy)
    spare = tiny_copy / "spare"
    (tiny_copy / one).rename(spare)
    (tiny_copy / other).rename(tiny_copy / one)
    spare.rename(tiny_copy / other)
    with pytest.raises(BundleError, match="swapped" if padded else "replaced") as caught:
        Pipeline.load(tiny_copy)
    assert any(str(tiny_copy / name) in str(caught.value) for name in (one, other))


def test_every_single_file_is_checked(tiny_copy: Path) -> None:
    for name in manifest_of(tiny_copy)["files"]:
        kept = (tiny_copy / name).read_bytes()
        flip_a_bit(tiny_copy / name)
        with pytest.raises(BundleError, match="contents differ"):
            Bundle.open(tiny_copy)
        (tiny_copy / name).write_bytes(kept)
    Bundle.open(tiny_copy)


def test_without_digests_a_cut_file_is_still_found_but_a_flipped_one_is_not(
    tiny_copy: Path,
) -> None:
    flip_a_bit(tiny_copy / FILES[1])
    Bundle.open(tiny_copy, verify="sizes")
    truncate(tiny_copy / FILES[1])
    with pytest.raises(BundleError, match="truncated"):
        Bundle.open(tiny_copy, verify="sizes")


def test_the_second_opening_hashes_no_file(
    tiny_copy: Path, home: Path, impatient: None, hashed: list[str]
) -> None:
    names = [Path(name).name for name in manifest_of(tiny_copy)["files"]]
    Bundle.open(tiny_copy)
    assert sorted(hashed) == sorted(names)
    hashed.clear()
    moved = tiny_copy.rename(tiny_copy.with_name("elsewhere"))
    Bundle.open(moved)
    Bundle.open(moved, verify="sizes")
    assert hashed == []
    Bundle.open(moved, verify="all")
    assert sorted(hashed) == sorted(names)


def test_sizes_and_links_are_checked_whatever_is_remembered(
    tiny_copy: Path, tmp_path: Path, home: Path, impatient: None, no_engines: None
) -> None:
    file, kept = tiny_copy / FILES[1], tmp_path / "kept"
    file.rename(kept)
    file.symlink_to(kept)
    digest = manifest_of(tiny_copy)["files"][FILES[1]]["sha256"]
    remember({file: digest})
    with pytest.raises(BundleError, match="a link that leaves the bundle"):
        Pipeline.load(tiny_copy)
    file.unlink()
    kept.rename(file)
    truncate(file)
    remember({file: digest})
    with pytest.raises(BundleError, match="truncated"):
        Pipeline.load(tiny_copy)


@pytest.mark.parametrize("verify", ["remembered", "all"])
def test_only_reading_anew_finds_an_edit_that_memory_takes_for_right(
    tiny_copy: Path, home: Path, impatient: None, no_engines: None, verify: Any
) -> None:
    file = tiny_copy / FILES[1]
    flip_a_bit(file)
    remember({file: manifest_of(tiny_copy)["files"][FILES[1]]["sha256"]})
    if verify == "remembered":
        Bundle.open(tiny_copy, verify=verify)
        return
    for again in (verify, "remembered"):
        with pytest.raises(BundleError, match="contents differ") as caught:
            Pipeline.load(tiny_copy, verify=again)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("verify", [True, False, None, "none", "All"])
def test_another_way_to_verify_is_refused_with_those_there_are(
    tiny_bundle: Path, verify: Any
) -> None:
    with pytest.raises(RequestError, match="verify: must be one of remembered, all, sizes, got"):
        Bundle.open(tiny_bundle, verify=verify)


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_link_that_leaves_the_bundle_is_refused(
    tiny_copy: Path, tmp_path: Path, whole_folder: bool
) -> None:
    """Even where its target has the right contents."""
    target = tiny_copy / ("vae" if whole_folder else "vae/config.json")
    outside = tmp_path / "outside"
    shutil.move(target, outside)
    target.symlink_to(outside)
    with pytest.raises(BundleError, match="a link that leaves the bundle; replace it by a copy"):
        Bundle.open(tiny_copy)


def test_a_link_inside_the_bundle_is_fine(tiny_copy: Path) -> None:
    file = tiny_copy / "vae" / "config.json"
    file.rename(tiny_copy / "vae" / "kept.json")
    file.symlink_to("kept.json")
    Bundle.open(tiny_copy)


# --- edited files ---


@pytest.mark.parametrize(
    "name",
    [
        *("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"),
        *("transformer/denoiser.fp32.onnx", "tokenizer_2/tokenizer.json"),
        *("transformer/null_text.safetensors", "probes/conditioner.safetensors"),
    ],
)
def test_a_file_that_will_be_read_but_has_no_digest_is_refused(tiny_copy: Path, name: str) -> None:
    """Else removing one line from the manifest would be enough to edit the file."""
    edit(tiny_copy, lambda values: values["files"].pop(name))
    with pytest.raises(BundleError, match=name):
        Bundle.open(tiny_copy)


def test_a_newer_format_says_which_one_this_version_reads(tiny_copy: Path) -> None:
    edit(tiny_copy, lambda values: values.update(format=FORMAT + 1))
    message = (
        rf"gentron\.json: bundle format {FORMAT + 1} is newer than .* format {FORMAT}; upgrade"
    )
    with pytest.raises(BundleError, match=message):
        Bundle.open(tiny_copy)


def test_a_manifest_that_is_no_text_is_refused(tiny_copy: Path) -> None:
    (tiny_copy / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match=r"gentron\.json: cannot be read"):
        Bundle.open(tiny_copy)


def test_an_edited_contract_is_refused(tiny_copy: Path) -> None:
    def rename(values: Values) -> None:
        values["contract"]["denoiser"]["inputs"][0]["name"] = "latents"

    edit(tiny_copy, rename)
    with pytest.raises(BundleError, match="contract is not the one this version derives"):
        Bundle.open(tiny_copy)


def test_a_configuration_that_makes_another_contract_is_refused(tiny_copy: Path) -> None:
    file = tiny_copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"depth": 4}))
    seal(tiny_copy, "transformer/config.json")
    with pytest.raises(BundleError, match="contract is not the one this version derives"):
        Bundle.open(tiny_copy)


def test_a_field_of_the_configuration_that_nobody_knows_is_named(tiny_copy: Path) -> None:
    file = tiny_copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"register_tokens": 4}))
    seal(tiny_copy, "transformer/config.json")
    with pytest.raises(BundleError, match=r"'register_tokens'.*newer version"):
        Bundle.open(tiny_copy)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\udcff"])
def test_a_configuration_that_is_no_json_object_is_named(tiny_copy: Path, text: str) -> None:
    file = tiny_copy / "vae" / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    seal(tiny_copy, "vae/config.json")
    with pytest.raises(BundleError, match=r"vae/config\.json: "):
        Bundle.open(tiny_copy)


# --- names ---


def test_a_checkpoint_is_told_apart_from_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BundleError, match="a checkpoint, not a bundle; run: gentron-export"):
        Bundle.open(tmp_path)


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two bundles that ship with the package, by name only."""
    for name in ("emoji", "faces"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
    (tmp_path / "not-a-bundle").mkdir()
    monkeypatch.setattr(gentron.bundle, "PACKAGED", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["emojy", "", "a/b/c", "emoji/gentron.json", "x" * 5000, "\0"])
def test_an_unknown_name_is_refused_with_the_names_there_are(packaged: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"was not found: .*\(emoji, faces\); make one with"):
        locate(name)


def test_a_packaged_bundle_is_found_by_its_name(packaged: Path) -> None:
    assert locate("faces") == packaged / "faces"
    assert locate(packaged / "faces") == (packaged / "faces").resolve()
