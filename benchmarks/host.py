"""What a step costs beside the network: our loop and diffusers' around one that computes nothing.

    python benchmarks/host.py [--size 256] [--steps 50] [--rounds 7] [--json FILE]

Ours is the real `DenoiseLoop` on an engine that computes nothing, and again on one whose call does
guidance and solver in numpy, which compiled graphs do inside the call. diffusers' is
`PixArtAlphaPipeline` with its own scheduler around a transformer that returns what it returned
before. All draw one guided picture with DPM-Solver++. A time is that of one step: of a whole loop,
first step excluded, by the number of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from contest import contest, markdown

from gentron.bench.peers import allocator
from gentron.bench.runner import Runner
from gentron.bench.worker import serve
from gentron.contract import contract
from gentron.engines.base import Array, Buffer, Call, Engine
from gentron.guidance import guidance_branches
from gentron.latents import vae_factor
from gentron.presets import PRESETS
from gentron.runtime.loop import DenoiseLoop
from gentron.runtime.sample import Sample
from gentron.runtime.text import EncodedText
from gentron.schedule import NoiseSchedule
from gentron.solvers import solver_table

GUIDANCE = 4.5


class HostBuffer(Buffer):
    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.array = np.zeros(shape, dtype)

    def write(self, values: Array) -> None:
        np.copyto(self.array, values)

    def write_rows(self, start: int, values: Array) -> None:
        np.copyto(self.array[start : start + len(values)], values)

    def read(self) -> Array:
        return self.array.copy()


class EmptyCall(Call):
    """Nothing at all."""

    def run(self) -> None:
        pass


class TailCall(Call):
    """Every row's output is zero; the tail of the denoiser's graph follows."""

    def __init__(self, buffers: Mapping[str, Buffer]):
        self._arrays = {name: buffer.array for name, buffer in buffers.items()}  # type: ignore[attr-defined]
        state, rows = self._arrays["state"], len(self._arrays["row_sample"])
        self._output = np.zeros((rows, *state.shape[2:]), np.float32)

    def run(self) -> None:
        arrays = self._arrays
        state, guidance = arrays["state"], arrays["guidance"]
        branches = self._output[arrays["slots"]]  # [B, 3, F, C, h, w]
        prediction = np.einsum("bj,bj...->b...", guidance, branches)
        terms = np.concatenate([state, prediction[:, None], arrays["noise"][:, None]], axis=1)
        flat = terms.reshape(*terms.shape[:2], -1)
        np.matmul(arrays["update"], flat, out=arrays["next_state"].reshape(*state.shape[:2], -1))
        arrays["bad"][:] = ~np.isfinite(arrays["next_state"]).all(axis=tuple(range(1, state.ndim)))


class EmptyEngine(Engine):
    """Has a component's tensors and computes nothing, or nothing but the tail of a step."""

    compute = "float32"

    def __init__(self, component: Any, tail: bool):
        self.component, self._tail = component, tail

    def buffer(self, name: str, shape: tuple[int, ...]) -> Buffer:
        return HostBuffer(shape, self.component.tensor(name).numpy_dtype(self.compute))

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        return TailCall(buffers) if self._tail else EmptyCall()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        sizes = self.component.bind({name: values.shape for name, values in feeds.items()})
        return {
            spec.name: np.zeros(
                [sizes[a] if isinstance(a, str) else a for a in spec.axes],
                spec.numpy_dtype(self.compute),
            )
            for spec in self.component.outputs
        }

    def close(self) -> None:
        pass


class OurLoop(Runner):
    def __init__(self, asked: dict[str, Any]):
        spec, tail = PRESETS["tiny"], asked["name"] == "gentron-tail"
        config = spec.transformer
        self._config, self._steps = config, asked["steps"]
        components = contract(config, vae_factor(spec.vae))
        self._engines = {name: EmptyEngine(c, tail) for name, c in components.items()}
        schedule = NoiseSchedule.from_config(spec.scheduler)
        texts = [
            EncodedText(
                prompt,
                tuple(np.zeros((t.max_tokens, t.width), np.float32) for t in config.text),
                tuple(np.ones(t.max_tokens, np.int64) for t in config.text),
                np.zeros(config.pooled_width, np.float32),
                "",
            )
            for prompt in ("a cat", "")
        ]
        table = solver_table("dpm++2m", schedule, asked["steps"])
        branches = guidance_branches(GUIDANCE, 1.0, moving=False)
        self._sample = Sample(table, branches, prompt=texts[0], negative=texts[1], seed=1)
        side = asked["size"] // 8
        self._shape = (1, config.latent_channels, side, side)
        how = "guidance and solver in numpy" if tail else "guidance and solver in the engine"
        self.facts = {"label": f"GenTron's loop, {how}"}

    def run(self) -> float:
        loop = DenoiseLoop(self._config, self._engines, [self._sample], self._shape)
        started = 0.0
        for step in loop.run():
            if step.index == 0:
                started = time.perf_counter()
        return (time.perf_counter() - started) / (self._steps - 1)


class DiffusersLoop(Runner):
    def __init__(self, asked: dict[str, Any]):
        import diffusers
        import torch
        from diffusers.configuration_utils import ConfigMixin, register_to_config
        from diffusers.models.modeling_utils import ModelMixin

        torch.set_num_threads(asked["threads"])

        class Empty(ModelMixin, ConfigMixin):  # type: ignore[misc]
            @register_to_config
            def __init__(self, sample_size: int, in_channels: int = 4, out_channels: int = 4):  # noqa: ARG002
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(1))

            def forward(self, hidden_states: Any, **_: Any) -> Any:
                if not hasattr(self, "output"):
                    self.output = torch.zeros_like(hidden_states)
                return (self.output,)

        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(PRESETS["xl2"].scheduler)
        side = asked["size"] // 8
        self._pipeline = diffusers.PixArtAlphaPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=Empty(side),
            scheduler=scheduler,
        )  # fmt: skip
        self._pipeline.set_progress_bar_config(disable=True)
        self._embeds = torch.zeros(1, 120, 4096)
        self._mask = torch.ones(1, 120)
        self._asked, self._torch, self._times = asked, torch, list[float]()
        self.facts = {
            "label": f"diffusers {diffusers.__version__}, PixArtAlphaPipeline{allocator()}"
        }

    def run(self) -> float:
        self._times.clear()
        with self._torch.inference_mode():
            self._pipeline(
                None,
                negative_prompt=None,
                prompt_embeds=self._embeds,
                prompt_attention_mask=self._mask,
                negative_prompt_embeds=self._embeds,
                negative_prompt_attention_mask=self._mask,
                num_inference_steps=self._asked["steps"],
                guidance_scale=GUIDANCE,
                height=self._asked["size"],
                width=self._asked["size"],
                output_type="latent",
                use_resolution_binning=False,
                callback=lambda *_: self._times.append(time.perf_counter()),
            )
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1)


def make(line: str) -> Runner:
    asked = json.loads(line)
    return DiffusersLoop(asked) if asked["name"] == "diffusers" else OurLoop(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each in a round")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more only cost here")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.exit(serve(make))
    shared = {key: vars(options)[key] for key in ("size", "steps", "threads")}
    asked = [shared | {"name": name} for name in ("gentron", "gentron-tail", "diffusers")]
    with tempfile.TemporaryDirectory() as folder:
        rows = contest(__file__, asked, options.rounds, options.seconds, Path(folder))
    title = f"Host time of a step at {options.size}x{options.size} with an empty network"
    sys.stdout.write(markdown(title, rows, options.rounds, "µs") + "\n")
    if options.json:
        options.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
