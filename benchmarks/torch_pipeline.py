"""The `emoji` bundle in torch, as diffusers writes its pipelines: what the runtime stands beside.

    python benchmarks/torch_pipeline.py "a red apple" -o apple.png [--seed 1] [--threads 2]

Encoders from transformers, scheduler and autoencoder from diffusers, the reference transformer;
the same weights, the same noise. Every step is a forward pass of the whole transformer over both
branches, then `scheduler.step`, as in diffusers' PixArt pipelines. Attention is fused, gradients
are off, denormals flushed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np


class TorchPipeline:
    """Prompts in, pictures out; float32 on the CPU."""

    def __init__(self, bundle: Path, threads: int):
        import diffusers
        import torch
        from tokenizers import Tokenizer

        from gentron.bench.torch_peer import load_module, set_up, use_fused_attention
        from gentron.bundle import tokenizer_file
        from gentron.config import GenTronConfig
        from gentron.export.components import parts
        from gentron.export.source import read_source

        set_up(threads)
        use_fused_attention()
        source = read_source(bundle)
        found = parts(source)
        self.config: GenTronConfig = source.config
        if len(source.encoders) != 1:
            raise SystemExit(f"{bundle}: has two text encoders, this pipeline takes one")
        self.torch = torch
        self.tokenizer = Tokenizer.from_file(str(bundle / tokenizer_file(0)))
        self.text_encoder = load_module(found["text_encoder"], bundle, "float32")
        self.decoder = load_module(found["vae_decoder"], bundle, "float32")
        self.transformer = load_transformer(bundle, source.config)
        scheduler = json.loads((bundle / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        self.scheduler = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)

    def __call__(self, prompt: str, *, seed: int, steps: int, guidance: float) -> Any:
        """Raw pixels uint8 [H, W, 3]."""
        from gentron.noise import INITIAL, normal

        torch, config, scheduler = self.torch, self.config, self.scheduler
        shape = (config.latent_channels, config.sample_height, config.sample_width)
        with torch.inference_mode():
            hidden, pooled, mask = self.encode(["", prompt])
            scheduler.set_timesteps(steps)
            latents = torch.from_numpy(normal(seed, INITIAL, 1, shape))
            latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
            for time in scheduler.timesteps:
                both = torch.cat([latents, latents])
                output = self.transformer(
                    both[:, None], time.expand(2), [hidden], [mask], pooled
                )[:, 0]  # fmt: skip
                without, with_text = output.chunk(2)
                guided = without + guidance * (with_text - without)
                latents = scheduler.step(guided, time, latents, return_dict=False)[0]
            pixels = self.decoder(latents)
            pixels = (pixels.clamp(-1, 1) + 1) * 127.5
            return pixels.round().to(torch.uint8)[0].permute(1, 2, 0).numpy()

    def encode(self, prompts: list[str]) -> tuple[Any, Any, Any]:
        encoded = self.tokenizer.encode_batch(prompts)
        ids = self.torch.tensor([e.ids for e in encoded])
        mask = self.torch.tensor([e.attention_mask for e in encoded])
        hidden, pooled = self.text_encoder(ids, mask)
        return hidden, pooled, mask


def load_transformer(bundle: Path, config: Any) -> Any:
    from gentron.export.streamed import read_tensor
    from gentron.model import GenTron
    from gentron.weights import stored_tensors

    model = GenTron(config).float()
    stored = stored_tensors(bundle / "transformer")
    model.load_state_dict({name: read_tensor(t).float() for name, t in stored.items()})
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("-m", "--model", default="emoji")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    from PIL import Image

    from gentron.bundle import locate

    pipeline = TorchPipeline(locate(options.model), options.threads)
    pixels = pipeline(
        options.prompt, seed=options.seed, steps=options.steps, guidance=options.guidance
    )
    Image.fromarray(np.ascontiguousarray(pixels)).save(options.output)


if __name__ == "__main__":
    main()
