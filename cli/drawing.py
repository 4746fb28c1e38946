"""What drawing images and drawing videos have in common: options, loading, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gentron.cli.common import Bytes, DeviceNumbers, Levels, Size, gathered, warn
from gentron.cli.progress import component_bars
from gentron.contract import PRECISIONS
from gentron.errors import RequestError

if TYPE_CHECKING:
    from gentron.engines.options import ComponentReport
    from gentron.runtime.devices import Devices
    from gentron.runtime.generation import Generation
    from gentron.runtime.pipeline import Pipeline

PRECISION_NAMES = {compute: name for name, compute in PRECISIONS.items()}
Command = Callable[..., None]

SAMPLING = (
    click.option("--steps", type=int, help="Denoising steps."),
    click.option("--solver", help="ddim, ddpm, dpm++2m, unipc, lcm, dmd, euler or euler-churn."),
    click.option("--guidance", type=float, help="How strictly to follow the prompt; 1 is off."),
    click.option("--guidance-interval", type=Levels(),
                 help="Guide only where LO < sigma <= HI; the other steps cost one row."),
    click.option("--negative", help="What to steer away from."),
    click.option("--seed", type=int, help="0 to 2**64-1; random if not given."),
    click.option("--size", type=Size(), help="Pixels, such as 128x128."),
)  # fmt: skip
ENGINES = (
    click.option("-m", "--model", "bundle", metavar="BUNDLE",
                 help="Packaged name or folder [emoji]."),
    click.option("--backend", help="See gentron-run doctor."),
    click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
                 help="To compute in [the backend's own]."),
    click.option("--int8", "precision", flag_value="int8",
                 help="OpenVINO: the denoiser's weights in 8 bits; refused if they lose too much."),
    click.option("--engines", type=click.Path(path_type=Path), help="Folder of gentron-build -o."),
    click.option("--engines-sha256", metavar="HEX", help="What gentron-build printed for it."),
    click.option("--no-build", is_flag=True, help="Refuse where an engine is missing."),
    click.option("--profile", "profiles", multiple=True, metavar="NAME=RANGE,...",
                 help="Shapes to compile for, as for gentron-build."),
    click.option("--max-memory", "--max-gpu-memory", "memory", type=Bytes(),
                 help="Such as 20GB: load components in turn, free them for each other."),
    click.option("--devices", type=DeviceNumbers(), metavar="N,...",
                 help="Numbers of GPUs [0]; several share the prompts of --prompts."),
    click.option("--threads", type=click.IntRange(min=1), help="Of the processor [all cores]."),
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Which bundle is to run on what."""

    bundle: str | None
    backend: str | None
    precision: str | None
    engines: Path | None
    engines_sha256: str | None
    no_build: bool
    profiles: tuple[str, ...]
    memory: int | None
    devices: tuple[int, ...] | None
    threads: int | None

    def load(self) -> Pipeline:
        """Behind progress bars where something has to be built; says which backend it chose."""
        if self.devices and len(self.devices) > 1:
            raise RequestError(
                "devices", "several share the --prompts of gentron-run image; name one here"
            )
        with component_bars() as (progress, _):
            pipe = self._load_on(self.devices[0] if self.devices else None, progress)
        if self.backend is None:
            click.echo(f"backend {pipe.backend.describe()}", err=True)
        return pipe

    def load_all(self) -> Devices:
        """A pipeline on each of several devices."""
        from gentron.runtime.devices import Devices

        assert self.devices
        with component_bars() as (progress, _):
            return Devices(lambda device: self._load_on(device, progress), self.devices)

    def _load_on(self, device: int | None, report: ComponentReport) -> Pipeline:
        from gentron.engines.options import EngineOptions, engine_store
        from gentron.runtime import Pipeline

        store = engine_store(self.engines, self.engines_sha256, build=not self.no_build)
        options = EngineOptions(
            store=store, device=device, threads=self.threads or 0, report=report
        )
        return Pipeline.load(
            "emoji" if self.bundle is None else self.bundle,
            backend=self.backend,
            precision=self.precision,
            profiles=self.profiles,
            memory=self.memory,
            options=options,
        )

    def as_recorded(self, metadata: dict[str, Any]) -> Choice:
        """What a file says of itself, unless told otherwise."""
        from gentron.runtime.repeat import engines_of

        before = engines_of(metadata).get("denoiser", {})
        recorded = PRECISION_NAMES.get(before.get("precision", ""), "fp32")
        return replace(
            self,
            bundle=str(metadata.get("bundle")) if self.bundle is None else self.bundle,
            backend=before.get("backend") if self.backend is None else self.backend,
            precision=self.precision or recorded,
        )


def engine_options(command: Command) -> Command:
    """Those that say which bundle is to run on what, as one `Choice`."""
    return gathered(command, "choice", Choice, ENGINES)


def drawing_options(command: Command) -> Command:
    """The options of both commands: engines as one `Choice`, sampling as `given`, without those
    that were not given."""

    @wraps(command)
    def gather(**options: Any) -> None:
        choice = Choice(**{field.name: options.pop(field.name) for field in fields(Choice)})
        names = [name for name in (*_names(SAMPLING), "batch") if name in options]
        sampling = {name: options.pop(name) for name in names}
        given = {name: value for name, value in sampling.items() if value is not None}
        command(choice=choice, given=given, **options)

    for option in reversed((*SAMPLING, *ENGINES)):
        gather = option(gather)
    return gather


def _names(options: tuple[Callable[[Command], Command], ...]) -> list[str]:
    probe = click.Command("probe")
    for option in options:
        option(probe)
    return [parameter.name for parameter in probe.params if parameter.name]


def flags(given: Iterable[str]) -> str:
    """As they were typed."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def draw(generation: Generation) -> None:
    """Runs every step behind a progress bar with the time per step."""
    with _progress(generation.settings.prompt) as advance:
        for step in generation:
            advance(step.index + 1, step.total, step.seconds)
    for message in generation.warnings:
        warn(message)


@contextmanager
def _progress(prompt: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(prompt[:40]), total=None, pace="")

        def advance(done: int, total: int, seconds: float) -> None:
            bar.update(task, completed=done, total=total, pace=f"{seconds * 1000:.0f} ms/step")

        yield advance


def read_prompts(file: Path) -> list[str]:
    """One a line; raises RequestError."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("prompts", f"{file}: cannot be read: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise RequestError("prompts", f"{file}: holds no prompt; write one a line")
    return found
