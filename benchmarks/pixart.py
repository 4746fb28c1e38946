"""What importing a full-size PixArt folder takes: time, memory, disk; and what it compiles to.

    python benchmarks/pixart.py [--part transformer|text_encoder|vae ...] [--kind alpha-1024]
                                [--build tensorrt-rtx] [--scratch DIR] [--json FILE]

Writes a folder as diffusers lays one out, with seeded random weights in float16 and in shards: a
transformer of 0.6 billion parameters, T5-XXL's 4.8 billion, Stable Diffusion's autoencoder. Then
runs `gentron-export --checkpoint` on it, watching the memory of all its processes, and, if asked,
`gentron-build` on the result. Parts that are not asked for are there in shape alone, as holes in
their files. T5-XXL needs 20 GB of disk and most of the time. Everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = {
    "transformer": ("text_projection", "conditioner", "denoiser"),
    "text_encoder": ("text_encoder",),
    "vae": ("vae_decoder",),
}
STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model",
         "vae": "diffusion_pytorch_model"}  # fmt: skip
SHARD = 2_000_000_000  # bytes; the transformer gets two at a quarter of it
CHANGES = {  # of the released transformers' configuration, by kind
    "alpha-512": {"sample_size": 64},
    "alpha-1024": {"sample_size": 128},
    "sigma": {"sample_size": 128, "interpolation_scale": 2},
}
SMALL = ("adaln_single.linear", "to_out.0", "proj_out", "ff.net.2")  # where training starts at zero
POLL = 0.25  # seconds


def write_folder(folder: Path, kind: str, full: Iterable[str]) -> None:
    """A pipeline of the released size; parts that are not in `full` hold zeros."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import pixart_example

    from gentron.export.pixart_config import pixart_config
    from gentron.export.pixart_tensors import source_shapes
    from gentron.export.source import expected_tensors, from_preset
    from gentron.model.gentron import random_values
    from gentron.presets import preset

    like = preset("xl2-t5")
    origin = from_preset(like)
    transformer = {
        "_class_name": "PixArtTransformer2DModel",
        **{"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28},
        **{"in_channels": 4, "out_channels": 8, "patch_size": 2, "caption_channels": 4096},
        **{"cross_attention_dim": 1152, "norm_type": "ada_norm_single"},
        **CHANGES[kind],
    }
    pipeline = "PixArtSigmaPipeline" if kind == "sigma" else "PixArtAlphaPipeline"
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.0001,
                 "beta_end": 0.02, "solver_order": 2}  # fmt: skip
    for name, values in (
        ("model_index.json", {"_class_name": pipeline}),
        ("transformer/config.json", transformer),
        ("text_encoder/config.json", like.encoders[0]),
        ("vae/config.json", like.vae),
        ("scheduler/scheduler_config.json", scheduler),
        ("checkpoint.json", {"weights": "random"}),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values, indent=1), "utf-8")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(pixart_example.spiece_model())
    (folder / "README.md").write_text(pixart_example.CARD, "utf-8")
    config = pixart_config(
        transformer, kind, text_width=4096, max_tokens=120,
        size_conditioning=kind == "alpha-1024", factor=8,
    )  # fmt: skip

    def drawn(name: str, shape: tuple[int, ...]) -> Any:
        values = random_values(name, shape, zlib.crc32(name.encode()))
        if name.rsplit(".", 1)[0].endswith(SMALL) and len(shape) > 1:
            values *= 0.02 * shape[-1] ** 0.5
        return values

    tensors = {"transformer": {
        name: (shape, partial(drawn, name, shape))
        for name, shape in source_shapes(config, 8).items()
    }}  # fmt: skip
    for part in ("text_encoder", "vae"):
        tensors[part] = {
            name: (tuple(values.shape), partial(origin.read, part, name, tuple(values.shape)))
            for name, values in expected_tensors(origin.source, part)
        }
    for part, named in tensors.items():
        _store(folder / part, STEMS[part], named, SHARD // 4 if part == "transformer" else SHARD,
               real=part in full)  # fmt: skip


def _store(
    folder: Path,
    stem: str,
    tensors: dict[str, tuple[tuple[int, ...], Callable[[], Any]]],
    shard: int,
    *,
    real: bool,
) -> None:
    from gentron.export.storage import TensorSource, write_folder

    class Forgetful:
        def digest(self, _: Path) -> str | None:
            return None

        def finished(self, _: Path, __: str) -> None:
            pass

    if real:
        sources = [TensorSource(name, shape, "F16", read)
                   for name, (shape, read) in tensors.items()]  # fmt: skip
        write_folder(folder, stem, sources, shard, journal=Forgetful())
        return
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, _) in tensors.items():
        source = TensorSource(name, shape, "F16", lambda: None)
        offsets = [end, end + source.length]
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    with (folder / f"{stem}.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


class Memory:
    """The most that a process and all its descendants held together, looked at now and then."""

    def __init__(self, process: int):
        self.own = 0  # bytes of their own: heaps, stacks
        self.resident = 0  # with the pages of files that they map, which the system can drop
        self._process, self._ended = process, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL):
            held = [_held(process) for process in _family(self._process)]
            self.own = max(self.own, sum(own for own, _ in held))
            self.resident = max(self.resident, sum(resident for _, resident in held))


def _family(process: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rsplit(") ")[-1].split()[1]
                )
            except OSError:  # it has ended
                continue
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _held(process: int) -> tuple[int, int]:
    """Bytes of its own, and resident."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if " kB" in line}
    return int(sizes.get("RssAnon", 0)) * 1024, int(sizes.get("VmRSS", 0)) * 1024


def watched(command: list[str]) -> dict[str, object]:
    """Runs it to its end; raises SystemExit if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    memory = Memory(process.pid)
    try:
        status = process.wait()
    finally:
        process.kill()
        memory.end()
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with {status}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "own_gb": round(memory.own / 1e9, 2),
        "resident_gb": round(memory.resident / 1e9, 2),
    }


def measure(part: str, options: argparse.Namespace, folder: Path) -> Iterable[dict[str, object]]:
    bundle = folder / "bundle"
    only = [x for name in COMPONENTS[part] for x in ("--only", name)]
    module = [sys.executable, "-c", "from gentron.cli.export import main; main()"]
    export = [*module, "--checkpoint", str(folder / "pixart"), "--fp16", "-o", str(bundle), *only]
    facts = watched(export)
    yield {"part": part, "what": "export", **facts, "disk_gb": _size(bundle)}
    if options.build:
        module = [sys.executable, "-c", "from gentron.cli.build import main; main()"]
        for name in COMPONENTS[part]:
            engines = folder / f"engines-{name}"
            build = [*module, str(bundle), "--backend", options.build, "--component", name]
            facts = watched([*build, "-o", str(engines)])
            yield {"part": part, "what": f"build {name}", **facts, "disk_gb": _size(engines)}
            shutil.rmtree(engines)
    shutil.rmtree(bundle)


def _size(folder: Path) -> float:
    return round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e9, 2)


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| part | what | seconds | memory of its own | with mapped weights | written |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['part']} | {row['what']} | {row['seconds']:,.0f} | {row['own_gb']:.2f} GB | "
            f"{row['resident_gb']:.2f} GB | {row['disk_gb']:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=COMPONENTS, help="repeatable; all")
    parser.add_argument("--kind", choices=CHANGES, default="alpha-1024")
    parser.add_argument("--build", metavar="BACKEND", help="compile what was exported")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    parts = tuple(options.part or COMPONENTS)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rows: list[dict[str, object]] = []
    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as made:
        folder = Path(made)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        write_folder(folder / "pixart", options.kind, parts)
        for part in parts:
            for row in measure(part, options, folder):
                sys.stderr.write(f"{json.dumps(row)}\n")
                rows.append(row)
    sys.stdout.write(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores\n\n")
    sys.stdout.write(table(rows) + "\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
