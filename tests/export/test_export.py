"""An export is proven against PyTorch, repeatable to the byte, and all or nothing."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gentron.bundle import Bundle
from gentron.errors import ParityError
from gentron.export import component
from gentron.export.bundle_writer import export_bundle
from gentron.runtime import Pipeline

TABLE_2 = ("tiny-clip-adaln", "tiny-clip", "tiny-t5")


def contents(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "export-report.json"
    }


def test_exporting_a_checkpoint_twice_gives_the_same_bytes(exported, tmp_path):
    """A bundle is a checkpoint too, so the first export is also the second one's source."""
    first = exported("tiny-clip-adaln")
    again = export_bundle(checkpoint=first, fp16=True, output=tmp_path / "again")
    a, b = contents(first), contents(again)
    # The manifest repeats what a preset knows of itself; everything else must be equal.
    assert {k for k in a if a[k] != b.get(k)} <= {"gentron.json"}
    third = export_bundle(checkpoint=again, fp16=True, output=tmp_path / "third")
    manifests = [
        {k: v for k, v in json.loads((f / "gentron.json").read_text()).items() if k != "name"}
        for f in (again, third)
    ]
    assert manifests[0] == manifests[1]
    assert contents(third).keys() == b.keys()


@pytest.mark.parametrize("preset", TABLE_2)
def test_every_text_variant_of_table_2_exports_and_runs(exported, preset):
    with Pipeline.load(exported(preset)) as pipeline:
        one = pipeline("a cat", seed=1)
        assert one.images.shape == (1, 16, 16, 3)
        other = pipeline("a dog", seed=1)
    assert np.abs(one.latents - other.latents).max() > 1e-4  # the text arrives
    names = {spec.name for spec in pipeline.bundle.components["denoiser"].inputs}
    assert ("row_text" in names) == (preset != "tiny-clip-adaln")


def parity(folder: Path) -> list[dict]:
    report = json.loads((folder / "export-report.json").read_text())
    return [agreement for found in report["components"] for agreement in found["parity"]]


def test_the_report_holds_the_parity_of_every_output(tiny_bundle):
    report = parity(tiny_bundle)
    bundle = Bundle.open(tiny_bundle)
    expected = {
        (name, compute, spec.name)
        for name, component in bundle.components.items()
        for compute in ("float16", "float32")
        for spec in component.outputs
    }
    assert {(r["component"], r["compute"], r["output"]) for r in report} == expected
    assert all(r["passed"] for r in report)
    assert max(r["max_relative"] for r in report if r["compute"] == "float32") < 2e-5
    assert "export-report.json" not in bundle.manifest.files


def test_a_graph_that_disagrees_with_torch_stops_the_export(tmp_path, monkeypatch):
    original = component.reference

    def wrong(*args, **kwargs):
        found = original(*args, **kwargs)
        found.outputs[0]["modulation"] *= 1.001
        return found

    monkeypatch.setattr(component, "reference", wrong)
    with pytest.raises(ParityError, match=r"conditioner in float32: output modulation"):
        export_bundle(
            model="tiny-clip-adaln", fp32=True, only=["conditioner"], output=tmp_path / "bundle"
        )
    assert not (tmp_path / "bundle").exists()


def test_bfloat16_graphs_are_checked_by_onnx_own_evaluator(tmp_path):
    folder = export_bundle(
        model="tiny-clip-adaln", bf16=True, only=["conditioner"], output=tmp_path / "bundle"
    )
    half = [r for r in parity(folder) if r["compute"] == "bfloat16"]
    assert {r["runner"] for r in half} == {"onnx.reference"}
    assert all(0 < r["max_relative"] < 0.15 for r in half if r["output"] == "modulation")
    assert (folder / "transformer" / "conditioner.bf16.onnx").is_file()
    assert (folder / "transformer" / "conditioner.fp32.onnx").is_file()


def test_diffusers_and_transformers_open_the_parts_of_a_bundle(tiny_bundle):
    import diffusers
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = transformers.CLIPTextModel.from_pretrained(tiny_bundle / "text_encoder").float()
        t5 = transformers.T5EncoderModel.from_pretrained(tiny_bundle / "text_encoder_2")
        vae = diffusers.AutoencoderKL.from_pretrained(tiny_bundle / "vae")
        scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(tiny_bundle / "scheduler")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tiny_bundle / "tokenizer" / "tokenizer.json"), pad_token="<end>"
        )
    assert clip.config.hidden_size == 32
    assert t5.config.d_model == 48
    assert vae.config.scaling_factor == 0.18215
    assert scheduler.config.prediction_type == "epsilon"
    ids = tokenizer("a cat", padding="max_length", max_length=16)["input_ids"]
    # The encoder opened by transformers gives what our exported graph gives.
    with torch.inference_mode():
        wanted = clip(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    with Pipeline.load(tiny_bundle) as pipeline:
        found = pipeline._text.encode(["a cat"])[0].hidden[0]
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5


def test_a_moved_bundle_still_runs(tiny_copy, tmp_path):
    moved = tiny_copy.rename(tmp_path / "somewhere else")
    with Pipeline.load(moved) as pipeline:
        assert pipeline("a cat", seed=1, steps=1).images.any()


class Forgetful:
    """A journal that never knows a file from before."""

    def __init__(self):
        self.seen = {}

    def digest(self, file):
        return None

    def finished(self, file, sha256):
        self.seen[file] = sha256


def test_shards_hold_the_same_tensors_as_one_file(tmp_path):
    from gentron.export.storage import TensorSource, write_folder
    from gentron.weights import stored_tensors

    values = {f"t{i}": torch.randn(3, 5 + i) for i in range(6)}
    sources = [
        TensorSource(name, tuple(v.shape), "F32", lambda v=v: v) for name, v in values.items()
    ]
    journal = Forgetful()
    files = write_folder(tmp_path / "many", "model", sources, 200, journal=journal)
    assert len(files) == 4
    assert journal.seen == {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    write_folder(tmp_path / "one", "model", sources, 10**9, journal=journal)
    from safetensors.torch import load_file

    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    for name, v in values.items():
        assert torch.equal(load_file(tmp_path / "many" / index["weight_map"][name])[name], v)
        assert torch.equal(load_file(tmp_path / "one" / "model.safetensors")[name], v)
    assert stored_tensors(tmp_path / "many").keys() == values.keys()
    assert max(file.stat().st_size for file in files) < 200 + 1000
