"""gentron-check: does this bundle, on this machine's engine, compute what torch computed?"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

import gentron
from gentron.cli.common import run_command, say

if TYPE_CHECKING:
    from gentron.agreement import Agreement
    from gentron.bundle import Bundle
    from gentron.engines.probe_check import GraphCheck

EXIT_DISAGREES = 1
HEADER = ("component", "graph", "computed", "output", "sizes")
WHAT_NOW = (
    "copy the bundle again from where it came, or export it again; if the same lines fail then, "
    "it is the engine: try another --backend"
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle")
@click.option("--backend", help="See gentron-run doctor.")
@click.option("--component", "components", multiple=True, metavar="NAME",
              help="Check this one only; may be repeated.")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
              help="Check in this one only.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@click.version_option(gentron.__version__)
def cli(
    bundle: str,
    backend: str | None,
    components: tuple[str, ...],
    precision: str | None,
    as_json: bool,
) -> None:
    """Replay the golden probes of BUNDLE, a packaged name or a folder, on an engine.

    Every graph is held against the outputs that torch gave at export; torch itself is not needed.
    Exit code 0: all agree, 1: some do not, 2: nothing was checked.
    """
    from gentron.bundle import Bundle
    from gentron.engines import backend_named
    from gentron.engines.probe_check import check_bundle

    with backend_named(backend) as engines:
        opened = Bundle.open(bundle)
        checks = check_bundle(opened, engines, components, precision)
        widths = _widths(opened)
        if not as_json:
            say(f"{opened.path}, digest {opened.digest[:16]}")
            say(f"{_columns(HEADER, widths)}  max-abs  relative   cosine")
        done = []
        for check in checks:
            done.append(check)
            for line in () if as_json else _lines(check, widths):
                say(line)
        failed = [f"{c.component} {c.precision}" for c in done if c.result == "fail"]
        if as_json:
            facts = {"bundle": str(opened.path), "name": opened.manifest.name}
            facts |= {"digest": opened.digest, "backend": engines.name}
            checked = [check.to_dict() for check in done]
            say(json.dumps(facts | {"passed": not failed, "checks": checked}, indent=1))
        else:
            say(_summary(done))
    if failed:
        click.echo(f"error: not what torch computes: {', '.join(failed)}; {WHAT_NOW}", err=True)
        sys.exit(EXIT_DISAGREES)


def _summary(done: list[GraphCheck]) -> str:
    tried = [check for check in done if check.result != "skipped"]
    agree = sum(check.result == "pass" for check in tried)
    skipped = f", {len(done) - len(tried)} skipped" if len(tried) < len(done) else ""
    runners = ", ".join(sorted({check.runner for check in tried}))
    return f"{agree} of {len(tried)} graphs agree with torch{skipped} ({runners})"


def _lines(check: GraphCheck, widths: list[int]) -> list[str]:
    """One line for each output of each case, and one for a graph that did not run."""
    lines = [_line(check, agreement, widths) for agreement in check.agreements]
    start = _columns((check.component, check.precision or "-", check.computed or "-"), widths)
    if check.skipped:
        lines.append(f"{start}  skipped: {check.skipped}")
    if check.problem:
        lines.append(f"{start}  FAIL: {check.problem}")
    return lines


def _line(check: GraphCheck, agreement: Agreement, widths: list[int]) -> str:
    from gentron.agreement import TOLERANCES

    texts = (check.component, check.precision, check.computed, agreement.output)
    start = _columns((*texts, _sizes(agreement.sizes)), widths)
    numbers = f"{agreement.max_absolute:7.1e}  {agreement.max_relative:8.1e}  "
    start += f"  {numbers}{agreement.cosine:9.7f}"
    if agreement.passed:
        return f"{start}  PASS"
    allowed = TOLERANCES[agreement.compute]
    why = f"allowed {allowed.max_relative:g} relative, cosine {allowed.cosine:g}"
    return f"{start}  FAIL: {agreement.problem or why}"


def _widths(bundle: Bundle) -> list[int]:
    """Of the columns in words, known before anything has run."""
    from gentron.probe import probe_sizes

    components = bundle.components.values()
    shown = [_sizes(sizes) for c in components for sizes in probe_sizes(c, bundle.config)]
    outputs = [spec.name for component in components for spec in component.outputs]
    columns = (list(bundle.components), ["fp32"], ["bfloat16"], outputs, shown)
    return [max(map(len, (title, *c))) for title, c in zip(HEADER, columns, strict=True)]


def _sizes(sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _columns(texts: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=False))


def main() -> None:
    run_command(cli)
