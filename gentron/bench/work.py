"""What is measured: the engine calls of a stage, with inputs that every contender can make again.

Inputs are a function of a seed (`gentron/probe.py`), so a contender needs the bundle and these few
numbers, and its outputs can be compared with those of any other.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from gentron.bundle import Bundle
from gentron.errors import RequestError
from gentron.guidance import guidance_branches
from gentron.latents import latent_size
from gentron.probe import ProbeCase, load_probes

# In the order in which a request meets them.
STAGES = ("encode", "condition", "step", "decode")
SEED = 4557
TABLE_CHUNK = 64  # most rows of a conditioner call, as in the loop


@dataclass(frozen=True)
class EngineCall:
    """One component with the inputs of one case."""

    component: str
    case: ProbeCase


@dataclass(frozen=True)
class Work:
    """One stage of one request; its calls run one after the other and count as one."""

    bundle: str
    stage: str
    calls: tuple[EngineCall, ...]
    precision: str = "fp32"
    threads: int = 0  # 0: all physical cores

    @property
    def sizes(self) -> dict[str, int]:
        """Of the last call, which is that of the stage's largest component."""
        return self.calls[-1].case.sizes

    def in_precision(self, precision: str) -> Work:
        return replace(self, precision=precision)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        values = json.loads(text)
        calls = tuple(EngineCall(c["component"], _case(c["case"])) for c in values.pop("calls"))
        return cls(calls=calls, **values)


@dataclass(frozen=True)
class Request:
    """What a picture or video is asked for; `size` is (width, height) in pixels."""

    size: tuple[int, int]
    batch: int = 1
    frames: int = 1
    steps: int = 20
    guidance: float = 4.0
    motion: float = 1.0


def request_of(
    bundle: Bundle,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    frames: int | None = None,
    guidance: float | None = None,
    motion: float | None = None,
) -> Request:
    """The bundle's own defaults, where nothing else is said; raises RequestError."""
    defaults, config = bundle.manifest.defaults, bundle.config
    frames = config.sample_frames if frames is None else frames
    if not 1 <= frames <= config.max_frames:
        raise RequestError("frames", f"must be 1 to {config.max_frames}, got {frames}")
    return Request(
        size=size or bundle.native_size,
        batch=batch,
        frames=frames,
        steps=defaults.steps,
        guidance=defaults.guidance if guidance is None else guidance,
        motion=defaults.motion if motion is None else motion,
    )


def stage_work(bundle: Bundle, stage: str, request: Request, threads: int = 0) -> Work:
    """The calls that one request makes of the engines of a stage: one step of `step`, one frame of
    `decode`, one new prompt of `encode`. Raises RequestError for a size that the model does not
    take."""
    config = bundle.config
    h, w = latent_size(config, bundle.vae_factor, *request.size)
    moving = config.temporal and request.frames > 1
    branches = guidance_branches(request.guidance, request.motion, moving=moving)
    texts = len({branch.text for branch in branches})
    table = request.steps * (texts if config.pooled_width else 1)
    sizes = {"B": request.batch, "R": request.batch * len(branches), "F": request.frames}
    sizes |= {"T": table, "U": texts, "K": 1, "h": h, "w": w}

    def call(name: str, **changed: int) -> EngineCall:
        axes = {a for spec in bundle.components[name].inputs for a in spec.axes}
        chosen = {axis: size for axis, size in (sizes | changed).items() if axis in axes}
        return EngineCall(name, ProbeCase(SEED, chosen))

    calls: list[EngineCall] = []
    for name in stage_components(bundle.components, stage):
        if stage == "encode":
            calls.append(_prompt(bundle, name))
        elif name == "conditioner":
            chunks = [min(TABLE_CHUNK, table - start) for start in range(0, table, TABLE_CHUNK)]
            calls += [call(name, T=rows) for rows in chunks]
        else:
            calls.append(call(name))
    return Work(str(bundle.path), stage, tuple(calls), threads=threads)


def stage_components(names: Collection[str], stage: str) -> list[str]:
    """Those of a model's components that a stage runs; raises RequestError."""
    if stage not in STAGES:
        raise RequestError("stage", f"unknown stage {stage!r}; one of {', '.join(STAGES)}")
    named = {
        "encode": [name for name in names if name.startswith("text_encoder")],
        "condition": ["text_projection", "conditioner"],
        "step": ["denoiser"],
        "decode": ["vae_decoder"],
    }
    return [name for name in named[stage] if name in names]


def profile_of(work: Work, bundle: Bundle) -> str:
    """The shapes of the work as gentron-build takes them: engines are compiled for these."""
    sizes = {axis: size for call in work.calls for axis, size in call.case.sizes.items()}
    parts = []
    if "B" in sizes:
        parts += [f"samples={sizes['B']}", f"rows={sizes['R']}", f"frames={sizes['F']}"]
    if "h" in sizes:
        factor = bundle.vae_factor
        parts.append(f"size={sizes['w'] * factor}x{sizes['h'] * factor}")
    for axis, name in (("T", "table"), ("U", "texts")):
        if axis in sizes:
            parts.append(f"{name}=1:{sizes[axis]}:{max(sizes[axis], 512 if axis == 'T' else 8)}")
    return ",".join(parts)


def _prompt(bundle: Bundle, name: str) -> EngineCall:
    """One text of the golden probes, whose tokens are a real prompt's."""
    probes = bundle.manifest.probes.get(name)
    if probes is None:
        raise RequestError(
            "stage", f"encode: this bundle has no {name}; export it again without --only"
        )
    case = load_probes(bundle.path / probes)[0][0]
    one = ProbeCase(case.seed, {**case.sizes, "U": 1}, case.token_ids[:1], case.token_mask[:1])
    return EngineCall(name, one)


def _case(values: dict[str, Any]) -> ProbeCase:
    rows = {key: tuple(map(tuple, values[key])) for key in ("token_ids", "token_mask")}
    return ProbeCase(values["seed"], values["sizes"], **rows)
