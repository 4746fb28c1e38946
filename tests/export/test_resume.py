"""An export that stops goes on where it was; what stops it is said, with what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from gentron.bundle import Bundle
from gentron.errors import OutputError, ParityError, RequestError, ResourceError
from gentron.export import export_bundle, plan, storage
from gentron.export.workspace import Workspace

# The quickest component, and shards small enough that it has several.
CHOICE = {"model": "tiny-clip-adaln", "fp32": True, "only": ["conditioner"]}
SHARDS = {"shard_size": 1_000_000}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "export-report.json"
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(**CHOICE, output=tmp_path_factory.mktemp("whole") / "bundle")


class Stop(Exception):
    """Stands for whatever ends a process in the middle."""


def stop_at(word: str, error: BaseException) -> Callable[[str, str, float], None]:
    def progress(component: str, doing: str, share: float) -> None:
        if word in doing:
            raise error

    return progress


def test_only_the_chosen_components_are_exported(uninterrupted):
    bundle = Bundle.open(uninterrupted)
    assert set(bundle.manifest.precisions) == set(bundle.manifest.probes) == {"conditioner"}
    weights = load_file(uninterrupted / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights
    assert all(name.startswith("conditioner.") for name in weights)
    assert not list(uninterrupted.glob("vae/*.safetensors"))


def test_an_unknown_component_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(RequestError, match=r"no component 'unet'; this model has text_encoder, "):
        export_bundle(model="tiny-clip", only=["unet"], output=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["tracing", "parity", "range audit"])
def test_a_stopped_export_goes_on_and_ends_the_same(uninterrupted, tmp_path, word):
    target = tmp_path / "bundle"
    with pytest.raises(Stop):
        export_bundle(**CHOICE, output=target, progress=stop_at(word, Stop()))
    assert not target.exists()
    weights = tmp_path / ".bundle.partial/transformer/diffusion_pytorch_model.safetensors"
    before = weights.stat()
    assert export_bundle(**CHOICE, output=target, resume=True) == target
    after = (target / "transformer/diffusion_pytorch_model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert contents(target) == contents(uninterrupted)
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_is_said_and_whole_shards_are_kept(tmp_path, monkeypatch):
    """The model is bigger than one shard here; the disk fills up in the second."""
    settings = {"model": "tiny-t5", "fp32": True, "only": ["conditioner", "vae_decoder"]} | SHARDS
    target, written = tmp_path / "bundle", []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 3:  # a shard, its journal line, then the next shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", fsync)
        with pytest.raises(OutputError, match=r"No space left.*free some space.*--resume"):
            export_bundle(**settings, output=target)
    partial = tmp_path / ".bundle.partial"
    whole = [f.name for f in partial.rglob("*.safetensors")]
    assert len(whole) == 1
    assert len(list(partial.rglob("*.unfinished"))) == 1
    doing: list[str] = []
    with pytest.raises(Stop):
        export_bundle(**settings, output=target, resume=True,
                      progress=lambda c, d, s: (doing.append(c), stop_at("tracing", Stop())(c, d, s)))  # fmt: skip  # noqa: E501
    assert not list(partial.rglob("*.unfinished"))
    assert "vae/" in doing


def test_nothing_is_kept_where_nothing_was_finished(tmp_path):
    with pytest.raises(Stop):
        export_bundle(**CHOICE, output=tmp_path / "b", progress=stop_at("weights", Stop()))
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_export_is_neither_overwritten_nor_mixed(tmp_path):
    target = tmp_path / "bundle"
    with pytest.raises(Stop):
        export_bundle(**CHOICE, output=target, progress=stop_at("tracing", Stop()))
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"unfinished export; add --resume .* or remove it"):
        export_bundle(**CHOICE, output=target)
    changed = CHOICE | {"only": ["vae_decoder"]}
    with pytest.raises(OutputError, match=r"started with components .*repeat the first command"):
        export_bundle(**changed, output=target, resume=True)
    after = contents(tmp_path)
    assert {k: v for k, v in after.items() if "lock" not in k} == {
        k: v for k, v in before.items() if "lock" not in k
    }


def test_two_exports_never_write_one_folder(tmp_path):
    first = Workspace(tmp_path / "bundle", {}, resume=False)
    with pytest.raises(OutputError, match="another export is writing it"):
        Workspace(tmp_path / "bundle", {}, resume=True)
    first.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_of_the_journal_costs_one_file(tmp_path):
    first = Workspace(tmp_path / "bundle", {}, resume=False)
    for name in ("a", "b"):
        (first.folder / name).write_bytes(name.encode())
        first.finished(first.folder / name, "0" * 64)
    journal = first.notes / "files.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    first._lock.close()
    again = Workspace(tmp_path / "bundle", {}, resume=True)
    assert again.digest(again.folder / "a") == "0" * 64
    assert again.digest(again.folder / "b") is None
    (again.folder / "a").write_bytes(b"longer")
    assert again.digest(again.folder / "a") is None


def test_a_small_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    told = []
    with pytest.raises(ResourceError, match=r"0\.\d\d GB are needed, 0\.00 GB are free"):
        export_bundle(**CHOICE, output=tmp_path / "bundle", planned=told.append)
    assert told[0].components == ("conditioner",)
    assert list(tmp_path.iterdir()) == []


def test_a_full_size_plan_knows_the_model_without_its_weights(tmp_path):
    told = []

    def planned(found):
        told.append(found)
        raise Stop

    with pytest.raises(Stop):
        export_bundle(model="g2", fp16=True, output=tmp_path / "g2", planned=planned)
    (found,) = told
    assert found.parameters == pytest.approx(8.03e9, rel=0.01)
    assert 16e9 < found.disk_bytes < 17.5e9
    assert "GB" in found.text
    assert "min" in found.text


def test_a_process_of_its_own_gives_the_same_bundle(uninterrupted, tmp_path):
    folder = export_bundle(**CHOICE, output=tmp_path / "bundle", isolate=True)
    assert contents(folder) == contents(uninterrupted)
    report = json.loads((folder / "export-report.json").read_text())
    (found,) = report["components"]
    assert 1e8 < found["peak_bytes"]["trace"] <= found["peak_bytes"]["parity"] < 4e9


def test_a_killed_process_is_reported_with_its_memory(tmp_path):
    def kill(component: str, doing: str, share: float) -> None:
        if "tracing" in doing:
            for child in psutil.Process().children():
                if any("gentron.export.worker" in word for word in child.cmdline()):
                    child.send_signal(signal.SIGKILL)

    with pytest.raises(ResourceError, match=r"conditioner: .*SIGKILL.* held 0\.\d+ GB.*--resume"):
        export_bundle(**CHOICE, output=tmp_path / "bundle", isolate=True, progress=kill)
    assert (tmp_path / ".bundle.partial").is_dir()


def test_an_interrupt_ends_the_process_too(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        export_bundle(**CHOICE, output=tmp_path / "bundle", isolate=True,
                      progress=stop_at("tracing", KeyboardInterrupt()))  # fmt: skip
    assert not [c for c in psutil.Process().children()
                if any("gentron.export.worker" in word for word in c.cmdline())]  # fmt: skip


def test_what_leaves_the_range_of_float16_is_an_error_of_the_same_kind(tiny_copy, tmp_path):
    """From another process too: a conditioner whose modulation reaches 20,000."""
    weights = tiny_copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = "conditioner.adaln.1.bias"
    tensors[name] = np.full_like(tensors[name], 20_000)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ParityError, match=r"conditioner: .* reaches 2e\+04 .*--bf16"):
        export_bundle(checkpoint=tiny_copy, fp16=True, only=["conditioner"],
                      output=tmp_path / "out", isolate=True)  # fmt: skip
