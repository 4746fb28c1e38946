"""The house rules that ruff and mypy cannot check, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("gentron", "export", "engines", "runtime", "cli")
PLANNED_LIBRARIES = frozenset({"cuda", "openvino", "tensorrt", "tensorrt_rtx"})
MAX_LINES = 400


def files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def short(file: Path) -> str:
    return str(file.relative_to(ROOT))


def libraries_in_use() -> set[str]:
    """Top-level names of every third-party package that a module imports, and those to come."""
    names = set(PLANNED_LIBRARIES)
    for node in (node for file in files(*FOLDERS) for node in ast.walk(parsed(file))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - {"gentron"}


def module_names(file: Path) -> Iterator[str]:
    """The name of a module, and of the package folder that it lies in below the five."""
    yield file.stem
    yield from file.relative_to(ROOT).parent.parts[1:]


def prints(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield node.lineno


def swallowed_errors(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """`except:`, and handlers that catch everything and do nothing."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            yield node.lineno, "bare except"
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        catches_all = any(ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)
        if catches_all and all(is_nothing(statement) for statement in node.body):
            yield node.lineno, f"except {ast.unparse(node.type)} that does nothing"


def is_nothing(statement: ast.stmt) -> bool:
    """`pass`, `...`, a string, `continue`."""
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass | ast.Continue)


def test_every_module_says_what_it_is_for() -> None:
    silent = [short(file) for file in files(*FOLDERS) if not ast.get_docstring(parsed(file))]
    assert not silent, f"modules without a docstring: {silent}"


def test_no_module_is_named_like_a_library() -> None:
    taken = libraries_in_use() | sys.stdlib_module_names
    clashes = sorted(
        {
            f"{short(file)} ({name})"
            for file in files(*FOLDERS)
            for name in module_names(file)
            if name in taken and not name.startswith("__")
        }
    )
    assert not clashes, f"named like a library or a standard module: {clashes}"


def test_no_file_is_longer_than_a_person_reads() -> None:
    lengths = {short(file): len(file.read_text().splitlines()) for file in files(*FOLDERS, "tests")}
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_only_the_command_line_prints() -> None:
    quiet = [folder for folder in FOLDERS if folder != "cli"]
    found = [f"{short(file)}:{line}" for file in files(*quiet) for line in prints(parsed(file))]
    assert not found, f"print() outside cli/; log, or return the text: {found}"


def test_no_error_is_swallowed() -> None:
    found = [
        f"{short(file)}:{line}: {what}"
        for file in files(*FOLDERS)
        for line, what in swallowed_errors(parsed(file))
    ]
    assert not found, "errors swallowed:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("handler", "count"),
    [
        ("except:\n    raise", 1),
        ("except Exception:\n    pass", 1),
        ("except (OSError, BaseException) as error:\n    ...", 1),
        ("except OSError:\n    pass", 0),
        ("except Exception as error:\n    log(error)", 0),
    ],
)
def test_a_swallowed_error_is_recognised(handler: str, count: int) -> None:
    tree = ast.parse(f"try:\n    f()\n{handler}")
    assert len(list(swallowed_errors(tree))) == count
