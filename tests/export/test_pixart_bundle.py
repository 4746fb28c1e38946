"""An imported PixArt, exported and run without torch, draws what diffusers' pipeline draws."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gentron.bundle import Bundle
from gentron.engines import backend_named
from gentron.export.bundle_writer import export_bundle
from gentron.guidance import guidance_branches
from gentron.noise import INITIAL, normal
from gentron.runtime import Pipeline
from gentron.runtime.describe import bundle_facts
from gentron.runtime.loop import DenoiseLoop
from gentron.runtime.sample import Sample
from gentron.solvers import solver_table

PROMPT = "  A Cat reading a NEWSPAPER, on the red turtle "
SIZES = ((64, 64), (96, 72))  # width and height in pixels
TRANSFORMER = ("text_projection", "conditioner", "denoiser")


@pytest.fixture(scope="module")
def pixart_bundle(pixart, pixart_script, bundle_cache) -> Callable[..., Path]:
    """The bundle of a kind, kept between runs while neither importer nor example changes."""
    script = hashlib.sha256(Path(pixart_script.__file__).read_bytes()).hexdigest()[:12]

    def get(kind: str, precision: str, only: tuple[str, ...] = ()) -> Path:
        target = bundle_cache / f"{kind}-{precision}-{script}"
        if not (target / "gentron.json").is_file():
            export_bundle(
                checkpoint=pixart(kind).folder, output=target, only=only, **{precision: True}
            )
        return target

    return get


@pytest.fixture(scope="module")
def whole(pixart_bundle) -> Path:
    """Every component of the kind that has everything, in float16 and float32."""
    return pixart_bundle("alpha-1024", "fp16")


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def running(request, whole) -> Iterator[tuple[str, Pipeline]]:
    with Pipeline.load(whole, precision=request.param) as pipeline:
        yield request.param, pipeline


def drawn_by_diffusers(pipe: Any, seed: int, size: tuple[int, int], **options: Any) -> Any:
    """Final latents, and pixels in 0..1, from our starting noise."""
    width, height = size
    noise = normal(seed, INITIAL, 1, (4, height // 2, width // 2))
    common = {
        "height": height,
        "width": width,
        "latents": torch.from_numpy(noise),
        "clean_caption": False,
        "use_resolution_binning": False,
        **options,
    }
    with torch.inference_mode():
        latents = pipe(PROMPT, output_type="latent", **common).images
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents.numpy(), (pixels / 2 + 0.5).clamp(0, 1).numpy()


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """In dB, against the reference's own range, which is the stricter peak."""
    peak = float(wanted.max() - wanted.min())
    return float(10 * np.log10(peak**2 / np.mean((found - wanted) ** 2)))


# In dB. Another prompt gives 42, one comma less 54, guidance 4.4 instead of 4.5 gives 67.
LIMITS = {"fp32": 100.0, "fp16": 80.0}


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_of_20_steps_equals_diffusers(running, pixart, size) -> None:
    """Same starting noise, DPM-Solver++ and guidance 4.5, which are the bundle's defaults."""
    precision, pipeline = running
    latents, pixels = drawn_by_diffusers(pixart("alpha-1024").pipe, 7, size)
    result = pipeline(PROMPT, seed=7, size=size)
    assert (result.settings.solver, result.settings.steps) == ("dpm++2m", 20)
    assert result.settings.guidance == 4.5
    decoded = pipeline._engines["vae_decoder"].run({"latents": result.latents[:, 0]})["pixels"]
    found = np.clip(decoded / 2 + 0.5, 0, 1)
    assert pixels.max() - pixels.min() > 0.2
    assert psnr(found, pixels) > LIMITS[precision]
    assert psnr(result.latents[:, 0], latents) > LIMITS[precision]
    assert np.abs(result.images[0] / 255 - pixels[0].transpose(1, 2, 0)).max() < 0.05
    other = pipeline(PROMPT.replace(",", ""), seed=7, size=size)
    assert psnr(other.latents[:, 0], latents) < 60


def test_negative_prompts_and_no_guidance_equal_diffusers_too(whole, pixart) -> None:
    with Pipeline.load(whole, precision="fp32") as pipeline:
        for ours, theirs in (
            ({"negative": "a DOG"}, {"negative_prompt": "a dog"}),
            ({"guidance": 1.0}, {"guidance_scale": 1.0}),
        ):
            latents, _ = drawn_by_diffusers(
                pixart("alpha-1024").pipe, 3, (64, 64), num_inference_steps=6, **theirs
            )
            result = pipeline(PROMPT, seed=3, steps=6, size=(64, 64), **ours)
            assert psnr(result.latents[:, 0], latents) > LIMITS["fp32"]


def test_every_prompt_is_lower_cased_and_stripped(whole) -> None:
    with Pipeline.load(whole, precision="fp32") as pipeline:
        text = pipeline._text
        shouted, plain = text.encode([" A CAT \n", "a cat"])
        assert np.array_equal(shouted.hidden[0], plain.hidden[0])
        assert int(plain.mask[0].sum()) == 3  # two words and the end
        null, spaces = text.encode(["", "   "])
        assert int(null.mask[0].sum()) == 1
        assert np.abs(null.hidden[0][0] - spaces.hidden[0][0]).max() < 1e-5


def test_the_stored_empty_text_is_the_one_diffusers_guides_with(whole, pixart) -> None:
    pipe = pixart("alpha-1024").pipe
    with torch.inference_mode():
        _, _, embeds, mask = pipe.encode_prompt(PROMPT, negative_prompt="")
    with Pipeline.load(whole, precision="fp32") as pipeline:
        (null,) = pipeline._text.encode([""])
    assert np.array_equal(null.mask[0], mask[0].numpy())
    assert np.abs(null.hidden[0][0] - embeds[0, 0].numpy()).max() < 1e-5


def test_the_picture_depends_on_the_size_it_is_told(whole) -> None:
    """Same latents, another size in pixels: only the conditioner sees it."""
    with Pipeline.load(whole, precision="fp32") as pipeline:
        (text,) = pipeline._text.encode(["a cat"])
        table = solver_table("ddim", pipeline.bundle.schedule, 2)
        branches = guidance_branches(1.0, 1.0, moving=False)
        sample = Sample(table, branches, text, text, 3)
        outputs = []
        for size in ((32, 32), (64, 32)):
            loop = DenoiseLoop(
                pipeline.bundle.config, pipeline._engines, [sample], (1, 4, 8, 8), size
            )
            for _ in loop.run():
                pass
            outputs.append(loop.latents())
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_the_denoiser_is_the_graph_that_gentron_has(whole, tiny_bundle) -> None:
    """Inputs, outputs and operators of the hot loop know nothing of PixArt, but for one norm."""
    import onnx

    mine, theirs = Bundle.open(whole), Bundle.open(tiny_bundle)
    names = [[s.name for s in b.components["denoiser"].inputs] for b in (mine, theirs)]
    assert set(names[1]) - set(names[0]) == {"text_kv_2", "text_bias_2"}
    assert set(names[0]) < set(names[1])
    kinds = [
        {
            n.op_type
            for n in onnx.load(b.graph("denoiser", "fp16"), load_external_data=False).graph.node
        }
        for b in (mine, theirs)
    ]
    assert kinds[0] <= kinds[1]
    assert [s.name for s in mine.components["conditioner"].inputs] == ["timesteps", "size"]


@pytest.mark.parametrize("kind", ["alpha-512", "sigma"])
def test_graphs_of_the_other_kinds_equal_diffusers_in_float32(pixart_bundle, pixart, kind) -> None:
    folder = pixart_bundle(kind, "fp32", TRANSFORMER)
    report = json.loads((folder / "export-report.json").read_text())
    worst = max(a["max_relative"] for c in report["components"] for a in c["parity"])
    assert worst < 1e-5
    _check_against_transformer(Bundle.open(folder), pixart(kind).pipe.transformer)


def test_graphs_with_size_conditioning_equal_diffusers_in_float32(whole, pixart) -> None:
    _check_against_transformer(Bundle.open(whole), pixart("alpha-1024").pipe.transformer)


def _check_against_transformer(bundle: Bundle, transformer: Any) -> None:
    """The update copies the prediction into the state, so what comes out of the three graphs is
    the network's own output; at a size that is not square."""
    from gentron.engines import backend_named, bundle_graph

    config, (height, width), rows = bundle.config, (10, 6), 2
    g = torch.Generator().manual_seed(9)
    tokens = config.text[0].max_tokens
    hidden = torch.randn(rows, tokens, config.text[0].width, generator=g)
    mask = (torch.arange(tokens)[None] < torch.tensor([[4], [31]])).long()
    latents = torch.randn(rows, 4, height, width, generator=g)
    times = torch.tensor([801, 77])
    size = torch.tensor([[2.0 * height, 2.0 * width]]).repeat(rows, 1)
    with torch.inference_mode():
        wanted = transformer(
            latents,
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            timestep=times,
            added_cond_kwargs={"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]},
            return_dict=False,
        )[0][:, :4].numpy()
    index = np.arange(rows)
    state = np.zeros((rows, 3, 1, 4, height, width), np.float32)
    state[:, 0, 0] = latents.numpy()
    update = np.zeros((rows, 3, 5), np.float32)
    update[:, 0, 3] = 1
    feeds: dict[str, Any] = {
        "state": state,
        "row_sample": index,
        "row_modulation": index,
        "row_text": index,
        "slots": np.repeat(index[:, None], 3, 1),
        "guidance": np.asarray([[1, 0, 0]] * rows, np.float32),
        "update": update,
        "noise": np.zeros((rows, 1, 4, height, width), np.float32),
    }
    conditions = {"timesteps": times.numpy().astype(np.float32), "size": size.numpy()}
    with backend_named("onnxruntime") as backend:

        def run(name: str, values: dict[str, Any]) -> dict[str, Any]:
            engine = backend.load(bundle_graph(bundle, name, "fp32"), "fp32")
            out: dict[str, Any] = engine.run(values)
            engine.close()
            return out

        known = {s.name for s in bundle.components["conditioner"].inputs}
        feeds |= run("conditioner", {k: v for k, v in conditions.items() if k in known})
        feeds |= run("text_projection", {"hidden_1": hidden.numpy(), "mask_1": mask.numpy()})
        found = run("denoiser", feeds)["next_state"][:, 0, 0]
    assert np.abs(found - wanted).max() < 1e-5


def test_a_decoder_that_leaves_float16_gets_its_float32_graph_alone(pixart, tmp_path) -> None:
    """As SDXL's autoencoder does, which PixArt-Sigma uses."""
    folder = Path(shutil.copytree(pixart("sigma").folder, tmp_path / "loud"))
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"] *= 30_000  # a norm follows
    save_file(tensors, file)
    doing: list[str] = []
    bundle = export_bundle(
        checkpoint=folder,
        only=["vae_decoder"],
        output=tmp_path / "out",
        progress=lambda component, what, share: doing.append(what),
    )
    opened = Bundle.open(bundle)
    assert opened.manifest.precisions["vae_decoder"] == ("fp32",)
    assert not (bundle / "vae" / "decoder.fp16.onnx").exists()
    assert any(what.startswith("float16 left out: reaches ") for what in doing)
    (found,) = json.loads((bundle / "export-report.json").read_text())["components"]
    assert not found["ranges"]["passed"]
    assert {a["compute"] for a in found["parity"]} == {"float32"}


def test_a_decoder_without_float16_runs_in_float32_by_default(whole, tmp_path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "bundle"))
    manifest = json.loads((folder / "gentron.json").read_text())
    manifest["precisions"]["vae_decoder"] = ["fp32"]
    (folder / "gentron.json").write_text(json.dumps(manifest), "utf-8")
    backend = backend_named("onnxruntime")
    backend.precisions = ("fp16", "fp32")  # as on a GPU
    with Pipeline(Bundle.open(folder), backend) as pipeline:
        computed = {name: engine.compute for name, engine in pipeline._engines.items()}
    assert computed["vae_decoder"] == "float32"
    assert computed["denoiser"] == "float16"


@pytest.mark.parametrize("name", TRANSFORMER)
def test_float16_graphs_parse_as_strongly_typed_networks(whole, name) -> None:
    rtx = pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="TensorRT-RTX's parser is not installed: pip install 'gentron[rtx]'",
    )
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(Bundle.open(whole).graph(name, "fp16")))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]


def test_a_bundle_says_what_it_is_and_on_what_terms(whole, pixart) -> None:
    facts = bundle_facts(Bundle.open(whole))
    assert facts["licences"] == {"transformer, text_encoder, vae": "openrail++"}
    assert facts["provenance"]["imported from"].startswith("PixArt-alpha with size conditioning")
    assert facts["weights"].startswith("random")  # as the example folder says of itself
    card = pixart("alpha-1024").folder / "README.md"
    assert (whole / "LICENSES" / "README.md").read_bytes() == card.read_bytes()
