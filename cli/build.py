"""gentron-build: a bundle's graphs become engines, ahead of time."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import gentron
from gentron.cli.common import run_command, say, warn
from gentron.cli.progress import component_bars
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.engines.build import Built
    from gentron.engines.cache import EngineCache

BACKENDS = ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime")
EXIT_DAMAGED = 1


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False)
@click.option("--backend", type=click.Choice(BACKENDS), help="What to compile for.")
@click.option("--gpu", "targets", metavar="SM,...",
              help="GPU generations, such as sm80,sm89 [portable if possible].")  # fmt: skip
@click.option("--profile", "profiles", multiple=True, metavar="NAME=RANGE,...",
              help="Shapes, such as samples=1:1:4,size=512x512; repeatable.")  # fmt: skip
@click.option("--component", "components", multiple=True, metavar="NAME",
              help="Build this one only; repeatable [all].")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp16", "fp32", "bf16", "int8"]),
              help="To compute in.")  # fmt: skip
@click.option(
    "--int8",
    "precision",
    flag_value="int8",
    help="OpenVINO: the denoiser's weights in 8 bits; refused if they lose too much.",
)
@click.option("--strip", is_flag=True, help="TensorRT: plans without weights, for small folders.")
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="Also copy the engines into this new folder, to run elsewhere.")  # fmt: skip
@click.option("--list", "list_engines", is_flag=True, help="List the engines in the cache.")
@click.option("--verify", is_flag=True, help="Read every engine in the cache anew.")
@click.option("--prune", is_flag=True, help="Remove leftovers, and what is over the budget.")
@click.option("--budget", type=float, help="For --prune, in GB; 0 removes all.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@click.version_option(gentron.__version__)
def cli(
    bundle: str | None,
    backend: str | None,
    targets: str | None,
    profiles: tuple[str, ...],
    components: tuple[str, ...],
    precision: str | None,
    strip: bool,
    output: Path | None,
    list_engines: bool,
    verify: bool,
    prune: bool,
    budget: float | None,
    as_json: bool,
) -> None:
    """Compile BUNDLE, a packaged name or a folder, into engines.

    They lie in the cache folder of the user, where gentron-run finds them; with -o also in a
    folder that runs on other machines: gentron-run --engines DIR --engines-sha256 HEX.
    """
    from gentron.engines.cache import EngineCache
    from gentron.engines.folder import check_new, write_folder

    manages = [list_engines, verify, prune]
    if sum(manages) + (bundle is not None) != 1:
        raise RequestError("bundle", "give either BUNDLE or one of --list, --verify, --prune")
    if budget is not None and not (prune and 0 <= budget < math.inf):
        raise RequestError("budget", f"belongs to --prune and is a number of GB, got {budget}")
    if any(manages):
        building = {"backend": backend, "gpu": targets, "profile": profiles, "strip": strip,
                    "component": components, "precision": precision, "output": output}  # fmt: skip
        if given := [name for name, value in building.items() if value]:
            raise RequestError(given[0], "is for building: name a BUNDLE, or leave it out")
        return _manage(EngineCache(), as_json, verify=verify, prune=prune, budget=budget)
    if backend is None or (strip and not backend.startswith("tensorrt")):
        named = "tensorrt" if strip else f"one of {', '.join(BACKENDS)}"
        raise RequestError("backend", f"name {named} with --backend")
    if output is not None:
        check_new(output)
    assert bundle is not None
    wanted = () if targets is None else tuple(name.strip() for name in targets.split(","))
    built = build(bundle, backend, targets=wanted, profiles=profiles, components=components,
                  precision=precision, strip=strip)  # fmt: skip
    sha256 = None
    if output is not None:
        sha256 = write_folder(output, (b.entry for b in built))
    if as_json:
        found: dict[str, Any] = {"engines": [_facts(b) for b in built]}
        if output is not None:
            found |= {"folder": str(output.resolve()), "sha256": sha256}
        say(json.dumps(found, indent=1))
        return None
    for b in built:
        say(line_of(b))
    if output is not None:
        say(f"use them: gentron-run image PROMPT -m {bundle} --backend {backend} "
            f"--engines {output} --engines-sha256 {sha256}")  # fmt: skip
    return None


def build(
    bundle: str | Path,
    backend: str,
    *,
    targets: tuple[str, ...] = (),
    profiles: tuple[str, ...] = (),
    components: tuple[str, ...] = (),
    precision: str | None = None,
    strip: bool = False,
) -> list[Built]:
    """Builds behind progress bars; also what `gentron-export --build` calls."""
    from gentron.bundle import Bundle
    from gentron.engines.build import build_engines, plan_builds
    from gentron.engines.graphs import declarations
    from gentron.engines.options import EngineOptions
    from gentron.engines.registry import compiler_named

    opened = Bundle.open(bundle)
    if opened.manifest.weights == "random":
        warn("the weights are random: the engines show wiring and speed, not pictures")
    with component_bars() as (progress, _):
        options = EngineOptions(targets=targets, strip=strip, report=progress)
        compiler = compiler_named(backend, options)
        jobs = plan_builds(
            opened,
            compiler,
            components=components,
            precision=precision,
            declarations=declarations(opened, profiles),
            targets=targets,
        )
        return list(build_engines(jobs, compiler, options))


def line_of(built: Built) -> str:
    entry = built.entry
    how = f"built in {entry.seconds:.1f} s" if entry.fresh else "was built before"
    shapes = "; ".join(
        " ".join(f"{axis}={range_}" for axis, range_ in profile.items())
        for profile in entry.key.profiles
    )
    return (
        f"{built.component:<16} {entry.key.precision}  {entry.size / 1e6:9.1f} MB  {how:<18} "
        f"{shapes or 'any shape'}"
    )


def _facts(built: Built) -> dict[str, Any]:
    entry = built.entry
    return {
        "component": built.component,
        "folder": str(entry.folder),
        "bytes": entry.size,
        "built_now": entry.fresh,
        "seconds": round(entry.seconds, 3),
        "key": entry.key.to_dict(),
        "facts": entry.facts,
    }


def _manage(
    cache: EngineCache, as_json: bool, *, verify: bool, prune: bool, budget: float | None
) -> None:
    if verify:
        _verify(cache, as_json)
    elif prune:
        _prune(cache, budget, as_json)
    else:
        _list(cache, as_json)


def _list(cache: EngineCache, as_json: bool) -> None:
    entries = cache.entries()
    if as_json:
        rows = [json.loads(e.to_json()) | {"folder": str(e.folder)} for e in entries]
        say(json.dumps({"folder": str(cache.folder), "engines": rows}, indent=1))
        return
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.created))
        say(f"{entry.folder.name}  {entry.size / 1e6:9.1f} MB  {when}  {entry.seconds:.1f} s")
    total = sum(entry.size for entry in entries)
    say(f"{len(entries)} engines, {total / 1e9:.2f} of {cache.budget / 1e9:.0f} GB, in "
        f"{cache.folder}")  # fmt: skip


def _verify(cache: EngineCache, as_json: bool) -> None:
    found = {}
    for name, problem in cache.verify():
        found[name] = problem
        if not as_json:
            say(f"{name}  {problem or 'as written'}")
    if as_json:
        rows = [{"name": name, "problem": problem} for name, problem in found.items()]
        say(json.dumps({"folder": str(cache.folder), "engines": rows}, indent=1))
    damaged = sum(map(bool, found.values()))
    if damaged:
        warn(f"{damaged} damaged; each is set aside and built again when it is needed")
        raise SystemExit(EXIT_DAMAGED)


def _prune(cache: EngineCache, budget: float | None, as_json: bool) -> None:
    removed = cache.prune(budget=None if budget is None else int(budget * 1e9))
    if as_json:
        rows = [{"name": gone.name, "bytes": gone.size, "why": gone.why} for gone in removed]
        say(json.dumps({"folder": str(cache.folder), "removed": rows}, indent=1))
        return
    for gone in removed:
        say(f"{gone.name}  {gone.size / 1e6:.1f} MB  {gone.why}")
    say(f"removed {sum(gone.size for gone in removed) / 1e9:.2f} GB from {cache.folder}")


def main() -> None:
    run_command(cli)
