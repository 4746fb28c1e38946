"""Temporal layers with zero outputs change nothing but the shape: frames are separate pictures."""

from __future__ import annotations

import json

import pytest
import torch

from gentron.bundle import Bundle
from gentron.errors import RequestError
from gentron.export.bundle_writer import export_bundle
from gentron.export.source import from_checkpoint, from_preset
from gentron.export.temporal import with_temporal_layers
from gentron.presets import preset


def run(model, latents, hidden, mask, motion_free=None) -> torch.Tensor:
    rows, config = latents.shape[0], model.config
    with torch.inference_mode():
        return model(
            latents,
            torch.full((rows,), 500),
            [hidden.expand(rows, -1, -1)],
            [mask.expand(rows, -1)],
            None,
            motion_free,
            torch.tensor([[16.0, 24.0]]).expand(rows, -1) if config.size_conditioning else None,
        )


@pytest.mark.parametrize("kind", ["alpha-1024", "sigma"])
def test_frames_of_the_video_model_are_pictures_of_the_image_model(
    kind, pixart, pixart_network
) -> None:
    image = from_checkpoint(pixart(kind).folder)
    video = with_temporal_layers(image)
    g = torch.Generator().manual_seed(2)
    text = image.source.config.text[0]
    hidden = torch.randn(1, text.max_tokens, text.width, generator=g).double()
    mask = (torch.arange(text.max_tokens)[None] < 5).long()
    latents = torch.randn(4, 4, 8, 12, generator=g).double()
    pictures = run(pixart_network(image), latents[:, None], hidden, mask)[:, 0]
    network = pixart_network(video)
    for motion_free in (False, True):
        frames = run(network, latents[None], hidden, mask, torch.tensor([motion_free]))[0]
        assert pictures.std() > 0.1
        assert (frames - pictures).abs().max() < 1e-12
    with torch.no_grad():
        network.denoiser.blocks[0].temporal.to_out.weight += 0.1  # trained, they would mix
    mixed = run(network, latents[None], hidden, mask)[0]
    assert (mixed - pictures).abs().max() > 1e-3


def test_only_the_new_layers_are_made_up_and_always_the_same(pixart) -> None:
    image = from_checkpoint(pixart("sigma").folder)
    first, second = with_temporal_layers(image), with_temporal_layers(image)
    old = {tensor.name: tensor for tensor in image.tensors("transformer", "F32")}
    new = {tensor.name: tensor for tensor in first.tensors("transformer", "F32")}
    again = {tensor.name: tensor for tensor in second.tensors("transformer", "F32")}
    assert {n for n in new if n not in old} == {n for n in new if ".temporal." in n}
    for name, tensor in new.items():
        assert torch.equal(tensor.read(), again[name].read())
        if name in old:
            assert torch.equal(tensor.read(), old[name].read())
        else:
            zero = ".to_out." in name or name.endswith(".bias")
            assert tensor.read().any() != zero, name


def test_the_bundle_is_a_video_model_and_says_what_it_is_good_for(pixart, tmp_path) -> None:
    said: list[str] = []
    folder = export_bundle(
        checkpoint=pixart("sigma").folder,
        video=True,
        fp32=True,
        only=["denoiser"],
        output=tmp_path / "out",
        found=said.append,
    )
    bundle = Bundle.open(folder)
    assert bundle.config.temporal
    assert bundle.config.sample_frames == 8
    assert "row_motion_free" in {s.name for s in bundle.components["denoiser"].inputs}
    assert bundle.manifest.provenance["temporal layers"] == "untrained, with zero outputs"
    assert said[-1].endswith("good for shape and speed, not for motion")
    report = json.loads((folder / "export-report.json").read_text())["components"][0]
    assert max(a["max_relative"] for a in report["parity"]) < 1e-5


def test_a_video_model_and_a_preset_are_refused(tmp_path) -> None:
    with pytest.raises(RequestError, match="has temporal layers already"):
        with_temporal_layers(from_preset(preset("tiny-video")))
    with pytest.raises(RequestError, match="give --model tiny-video instead"):
        export_bundle(model="tiny", video=True, output=tmp_path / "out")
