"""Who may import whom, read from the source; and what importing the runtime brings in and costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {  # folder of the checkout -> package it is installed as
    "gentron": "gentron",
    "export": "gentron.export",
    "engines": "gentron.engines",
    "runtime": "gentron.runtime",
    "cli": "gentron.cli",
}
LAYERS = (*FOLDERS.values(), "gentron.model", "gentron.train", "gentron.bench")
REFERENCE_ONLY = frozenset({"torch", "onnx", "transformers", "diffusers"})
NOT_AT_START = (*sorted(REFERENCE_ONLY), "onnxruntime")
MOST_TO_IMPORT = 3  # times what NumPy takes


@dataclass(frozen=True)
class Rule:
    """What a layer may import; `deferred` means inside a function or under TYPE_CHECKING."""

    layers: tuple[str, ...]  # besides itself
    deferred_layers: tuple[str, ...] = ()
    libraries: frozenset[str] | None = None  # at module level; None: any
    deferred_libraries: frozenset[str] | None = None  # None: any
    never: frozenset[str] = frozenset()


CORE_LIBRARIES = frozenset({"numpy", "safetensors"})
RULES = {
    "gentron": Rule((), (), CORE_LIBRARIES, CORE_LIBRARIES),
    "gentron.model": Rule(("gentron",)),
    "gentron.train": Rule(("gentron", "gentron.model")),
    "gentron.export": Rule(("gentron", "gentron.model"), ("gentron.engines",)),
    "gentron.engines": Rule(("gentron",), never=REFERENCE_ONLY),
    "gentron.runtime": Rule(("gentron", "gentron.engines"), never=REFERENCE_ONLY),
    "gentron.bench": Rule(  # peers import torch, in processes of their own and inside functions
        ("gentron", "gentron.engines", "gentron.runtime"),
        ("gentron.model", "gentron.export"),
        libraries=CORE_LIBRARIES,
    ),
    "gentron.cli": Rule(("gentron",), LAYERS, libraries=frozenset({"click"})),
}


class Import(NamedTuple):
    target: str  # dotted, with the imported name at the end: "torch.nn"
    line: int
    deferred: bool


def imports(node: ast.AST, deferred: bool = False) -> Iterator[Import]:
    """Every import below a node, those by importlib with a literal name included."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                for name in names:
                    yield Import(name.name, child.lineno, deferred)
            case ast.ImportFrom(module=module, names=names, level=level):
                for name in names:
                    target = f"{'.' * level}{module or ''}.{name.name}"
                    yield Import(target, child.lineno, deferred)
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield Import(target, child.lineno, deferred)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from imports(ast.Module([statement], []), True)
            for statement in child.orelse:
                yield from imports(ast.Module([statement], []), deferred)
        else:
            yield from imports(child, deferred or inside)


def layer_of(target: str) -> str:
    """The innermost layer that a dotted name lies in."""
    return max(
        (layer for layer in LAYERS if f"{target}.".startswith(f"{layer}.")), key=len, default=""
    )


def objection(layer: str, found: Import) -> str | None:
    """Why a module of `layer` may not have this import, or None."""
    rule, top = RULES[layer], found.target.split(".")[0]
    where = "even inside a function" if found.deferred else "at module level"
    if not top:
        return "is relative; write imports in full"
    if top == "gentron":
        other = layer_of(found.target)
        allowed = (layer, *rule.layers, *(rule.deferred_layers if found.deferred else ()))
        return None if other in allowed else f"is in {other}, not for {layer} {where}"
    libraries = rule.deferred_libraries if found.deferred else rule.libraries
    if top in sys.stdlib_module_names or top == "__future__":
        return None
    if top in rule.never or (libraries is not None and top not in libraries):
        return f"is not for {layer} {where}"
    return None


def source_files() -> Iterator[tuple[str, Path]]:
    """(layer, file) of every module of the packages."""
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield layer_of(".".join((package, *parts))), file


def objections_in(layer: str, source: str) -> list[str]:
    return [
        f"{found.line}: {found.target} {reason}"
        for found in imports(ast.parse(source))
        if (reason := objection(layer, found))
    ]


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter started in the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_imports_only_what_its_layer_may() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{text}"
        for layer, file in source_files()
        for text in objections_in(layer, file.read_text())
    ]
    assert not wrong, "imports in the wrong direction:\n" + "\n".join(wrong)


def test_every_package_has_modules_to_check() -> None:
    assert {layer for layer, _ in source_files()} == set(LAYERS) == set(RULES)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("gentron", "import torch"),
        ("gentron", "def f():\n    import torch"),
        ("gentron", "import click"),
        ("gentron", "from gentron import runtime"),
        ("gentron.model", "from gentron.train import emoji"),
        ("gentron.train", "from gentron.export import trace"),
        ("gentron.export", "from gentron.engines import backend_named"),
        ("gentron.export", "def f():\n    import gentron.runtime"),
        ("gentron.engines", "def f():\n    import gentron.runtime"),
        ("gentron.engines", "class A:\n    async def f(self):\n        from onnx import checker"),
        ("gentron.runtime", "def f():\n    importlib.import_module('torch.nn')"),
        ("gentron.runtime", "if TYPE_CHECKING:\n    import transformers"),
        ("gentron.runtime", "from gentron.model.vae import VaeDecoder"),
        ("gentron.runtime", "from . import loop"),
        ("gentron.bench", "import torch"),
        ("gentron.bench", "from gentron.export.components import parts"),
        ("gentron.cli", "import rich"),
        ("gentron.cli", "try:\n    from gentron.runtime import Pipeline\nfinally:\n    pass"),
        ("gentron.cli", "if TYPE_CHECKING:\n    pass\nelse:\n    import gentron.runtime"),
    ],
)
def test_a_wrong_import_is_found_wherever_it_stands(layer: str, source: str) -> None:
    assert len(objections_in(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("gentron", "import numpy as np\nfrom gentron.errors import RequestError\nimport json"),
        ("gentron.train", "import torch\nfrom gentron.model.vae import new_vae"),
        ("gentron.export", "import onnx\ndef f():\n    from gentron.engines import backend_named"),
        ("gentron.engines", "import numpy\ndef f():\n    import onnxruntime"),
        ("gentron.runtime", "import tokenizers\nfrom gentron import contract, engines"),
        ("gentron.bench", "def f():\n    import torch\n    from gentron.model import layers"),
        ("gentron.cli", "import click\ndef f():\n    import torch, rich, gentron.train.text"),
        ("gentron.cli", "if TYPE_CHECKING:\n    from gentron.runtime import Pipeline"),
    ],
)
def test_a_right_import_is_let_through(layer: str, source: str) -> None:
    assert objections_in(layer, source) == []


def test_the_runtime_and_its_command_line_start_without_torch() -> None:
    loaded = run_python(
        "import sys, gentron.runtime, gentron.cli.run, gentron.cli.bench, gentron.bench.run\n"
        f"print(*[name for name in {NOT_AT_START!r} if name in sys.modules])"
    )
    assert loaded.split() == []


def test_importing_the_runtime_takes_little_more_than_importing_numpy() -> None:
    def seconds(module: str) -> float:
        code = f"import time\nimport {module}\nprint(time.process_time())"
        return float(run_python(code))

    # In turn, so that a machine that is busy with other things is so for both.
    pairs = [(seconds("gentron.runtime"), seconds("numpy")) for _ in range(5)]
    ours, numpys = (min(times) for times in zip(*pairs, strict=True))
    assert ours < MOST_TO_IMPORT * numpys, f"{ours:.2f} s of CPU, NumPy {numpys:.2f} s"
