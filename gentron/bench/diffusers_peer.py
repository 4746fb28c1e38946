"""diffusers' `PixArtTransformer2DModel` of equal depth, width and tokens as a contender.

Not the same network: one text encoder, adaLN-single, and it projects the text at every step. It is
what a pipeline of diffusers would run in the place of our step, without guidance and solver.
"""

from __future__ import annotations

from typing import Any

from gentron.bench.peers import allocator
from gentron.bench.runner import Runner
from gentron.bench.torch_peer import compile_tuned, set_up
from gentron.bench.work import Work
from gentron.bundle import Bundle
from gentron.config import GenTronConfig
from gentron.contract import PRECISIONS
from gentron.errors import RequestError


class PixArtRunner(Runner):
    def __init__(self, work: Work, *, compiled: bool):
        """Raises RequestError for what PixArt has no form of."""
        import diffusers
        import torch

        bundle = Bundle.open(work.bundle, verify="sizes")
        config, sizes = bundle.config, work.sizes
        _check(config, work)
        set_up(work.threads)
        kind = getattr(torch, PRECISIONS[work.precision])
        torch.manual_seed(0)
        model = diffusers.PixArtTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_width,
            num_layers=config.depth,
            cross_attention_dim=config.width,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            patch_size=config.patch,
            sample_size=max(sizes["h"], sizes["w"]),
            caption_channels=config.text[-1].width,
            use_additional_conditions=False,
        )
        self._model = model.to(kind).eval()
        rows, length = sizes["R"], config.text[-1].max_tokens
        self._inputs: dict[str, Any] = {
            "hidden_states": torch.randn(
                rows, config.latent_channels, sizes["h"], sizes["w"], dtype=kind
            ),
            "encoder_hidden_states": torch.randn(rows, length, config.text[-1].width, dtype=kind),
            "timestep": torch.full((rows,), 500),
            "encoder_attention_mask": torch.ones(rows, length, dtype=kind),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }
        self._torch = torch
        self._function = compile_tuned(self._model) if compiled else self._model
        how = "compiled, frozen, max-autotune" if compiled else "eager"
        self.facts = {
            "label": f"diffusers {diffusers.__version__} PixArtTransformer2DModel, {config.depth} "
            f"blocks of {config.width}, {how}{allocator()}",
            "device": "cpu",
            "precision": work.precision,
            "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__},
        }

    def run(self) -> None:
        with self._torch.inference_mode():
            self._function(**self._inputs)


def _check(config: GenTronConfig, work: Work) -> None:
    if work.stage != "step":
        raise RequestError("against", f"diffusers stands beside steps, not {work.stage}")
    if config.temporal and work.sizes["F"] > 1:
        raise RequestError("against", "diffusers: PixArt draws single images; use --frames 1")
    if config.mlp_width != 4 * config.width:
        raise RequestError(
            "against",
            f"diffusers: PixArt's MLP is 4 times its width, this model's {config.mlp_width} / "
            f"{config.width}",
        )
