"""What several files share: walks by a solver's table, damage to stored JSON, and files whose
digests are remembered in a cache folder of the test's own."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from gentron import digests
from gentron.solvers import SolverTable

Array = NDArray[np.float64]
Model = Callable[[Array, float], Array]
Noise = Callable[[int, tuple[int, ...]], Array]
Walk = Callable[[SolverTable, Model, Array], Iterator[Array]]
Damage = Callable[[dict[str, Any]], st.SearchStrategy[dict[str, Any]]]

# What could stand where a stored value was; json.loads reads Infinity and NaN.
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**30, "", "..", "\0", "1", "x" * 5000, [], {}]),
    st.integers(),
    st.floats(),
    st.text(),
    st.recursive(st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
)


@pytest.fixture(scope="session")
def fake_model() -> Model:
    """Nonlinear in x and t, mixes neighbours, of the size of noise."""

    def model(x: Array, t: float) -> Array:
        mixed = 0.8 * x - 0.5 * np.roll(x, 1, axis=-1) + 0.3 * np.roll(x, 1, axis=-2)
        return np.asarray(1.5 * np.tanh(mixed + np.cos(t / 150.0)))

    return model


@pytest.fixture(scope="session")
def noise_of() -> Noise:
    """The noise of step s."""

    def noise(step: int, shape: tuple[int, ...]) -> Array:
        return np.random.default_rng(1000 + step).standard_normal(shape)

    return noise


@pytest.fixture(scope="session")
def walk_table(noise_of: Noise) -> Walk:
    """Latents after every step, by the table's own definition."""

    def walk(table: SolverTable, model: Model, x: Array) -> Iterator[Array]:
        state = np.zeros((3, *x.shape))
        state[0] = table.initial_scale * x
        for s, t in enumerate(table.timesteps):
            inputs = np.stack([*state, model(state[0], float(t)), noise_of(s, x.shape)])
            state = np.tensordot(table.updates[s], inputs, axes=1)
            yield state[0]

    return walk


@pytest.fixture(scope="session")
def damage() -> Damage:
    """A JSON object in which one value, at any depth, is replaced, renamed or gone."""

    @st.composite
    def damaged(draw: st.DrawFn, values: dict[str, Any]) -> dict[str, Any]:
        result = copy.deepcopy(values)
        nodes = [node for node in _containers(result) if node]
        node = draw(st.sampled_from(nodes))
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        what = draw(st.sampled_from(["replace", "replace", "rename", "remove"]))
        value = node.pop(key) if what != "replace" else None
        if what == "replace":
            node[key] = draw(STRANGE)
        elif what == "rename" and isinstance(node, dict):
            node[draw(STRANGE.filter(lambda v: isinstance(v, str)))] = value
        return result

    return damaged


def _containers(value: Any) -> Iterator[Any]:
    """Every object and list in a JSON value, itself included."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, of which no warning was given yet."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    digests._warn_once.cache_clear()
    yield folder
    digests._warn_once.cache_clear()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembers files at once, so that a test need not wait until they are two seconds old."""
    monkeypatch.setattr(digests, "SETTLED_NS", 0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose contents are hashed, as it happens."""
    names: list[str] = []
    original = hashlib.file_digest

    def file_digest(stream: Any, kind: str) -> Any:
        names.append(Path(stream.name).name)
        return original(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    return names


@pytest.fixture
def folder(tmp_path: Path, home: Path) -> Path:
    """An empty folder, and a cache folder for it."""
    made = tmp_path / "files"
    made.mkdir()
    return made


@pytest.fixture
def wanted(folder: Path) -> dict[str, str]:
    """sha256 of the three files now in `folder`; two of them are of one size."""
    contents = {"a": b"first", "b": b"other", "c": b"the third"}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
