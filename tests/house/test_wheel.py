"""What the wheel holds, built from a copy so that the checkout stays clean."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {  # folder of the checkout -> its place in the wheel
    "gentron": "gentron",
    "export": "gentron/export",
    "engines": "gentron/engines",
    "runtime": "gentron/runtime",
    "cli": "gentron/cli",
}
NOT_SOURCE = frozenset({".git", ".venv", "build", "dist", "training"})  # where there is no git
UNSAFE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
MAX_WHEEL_BYTES = 100_000_000
MAX_FILE_BYTES = 30_000_000
COMMANDS = {"gentron-run", "gentron-export", "gentron-train"}


def source_paths() -> list[Path]:
    """Files of the checkout that are in git or could be added, relative to its root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = {Path(name) for name in done.stdout.split("\0") if name}
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository
        names = {
            name
            for file in ROOT.rglob("*")
            if not NOT_SOURCE.intersection((name := file.relative_to(ROOT)).parts)
            and not any("cache" in part or part.endswith(".egg-info") for part in name.parts)
        }
    return sorted(name for name in names if (ROOT / name).is_file())


def installed_name(path: Path) -> str | None:
    """Where a file of the checkout lies in the wheel; None if it belongs to no package."""
    folder, *rest = path.parts
    return "/".join((FOLDERS[folder], *rest)) if rest and folder in FOLDERS else None


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy, built = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in source_paths():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built)]
    done = subprocess.run(
        command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(wheel_file: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel_file) as archive:
        yield archive


@pytest.fixture(scope="session")
def names(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if not name.endswith("/")}


def test_the_wheel_installs_nothing_at_the_top_but_gentron(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    info = {top for top in tops if re.fullmatch(r"gentron-[^/]+\.dist-info", top)}
    assert len(info) == 1
    assert tops - info == {"gentron"}


def test_the_wheel_is_under_100_megabytes(wheel_file: Path) -> None:
    assert wheel_file.stat().st_size < MAX_WHEEL_BYTES


def test_the_wheel_holds_every_module_of_the_checkout_and_no_other(names: set[str]) -> None:
    modules = {
        place for path in source_paths() if path.suffix == ".py" and (place := installed_name(path))
    }
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_wheel_holds_the_packaged_bundles_whole(names: set[str]) -> None:
    inside = "gentron/bundles/"
    bundled = {path.as_posix() for path in source_paths() if path.as_posix().startswith(inside)}
    assert {name for name in names if name.startswith(inside)} == bundled


def test_the_wheel_holds_the_word_list_the_type_marker_and_the_licence(names: set[str]) -> None:
    assert {"gentron/train/nouns.txt", "gentron/py.typed"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_holds_the_page_of_the_server(names: set[str]) -> None:
    inside = {file.name for file in (ROOT / "runtime" / "page").iterdir()}
    assert "index.html" in inside
    assert {f"gentron/runtime/page/{name}" for name in inside} <= names


def test_the_wheel_holds_no_pickled_weights(names: set[str]) -> None:
    assert not [name for name in names if Path(name).suffix.lower() in UNSAFE_SUFFIXES]


def test_every_command_of_the_wheel_leads_to_a_module_in_it(
    wheel: zipfile.ZipFile, names: set[str]
) -> None:
    (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.read_string(wheel.read(entry_points).decode())
    scripts = dict(parser["console_scripts"])
    assert scripts.keys() >= COMMANDS
    modules = {target.split(":")[0].replace(".", "/") + ".py" for target in scripts.values()}
    assert modules <= names


def test_no_file_of_the_checkout_is_over_30_megabytes() -> None:
    sizes = {path.as_posix(): (ROOT / path).stat().st_size for path in source_paths()}
    large = {name: size for name, size in sizes.items() if size >= MAX_FILE_BYTES}
    assert not large, f"shard these, or name them in .gitignore: {large}"
