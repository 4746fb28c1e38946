"""The conditioning tables on the device, in pages: a row is computed when it is first needed,
shared by all samples that name it, and reused once no sample does.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gentron.config import GenTronConfig
from gentron.engines import Buffer, Engine
from gentron.errors import ResourceError
from gentron.runtime.finite import check_finite
from gentron.runtime.sample import Conditioning
from gentron.runtime.text import EncodedText

Arrays = dict[str, npt.NDArray[np.generic]]
Size = tuple[int, int]  # (H, W) in pixels
Key = TypeVar("Key", bound=Hashable)
TextKey = str
ModulationKey = tuple[str | None, float, Size | None]
MODULATION_CHUNK = 64  # rows per conditioner call: bounds its memory at about 64 MB for G/2


class Pages(Generic[Key]):
    """Which row holds what. A row that nobody uses keeps its values until it is needed."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._rows: dict[Key, int] = {}
        self._users: Counter[Key] = Counter()
        self._idle: OrderedDict[Key, None] = OrderedDict()  # used longest ago first
        self._never_used = deque(range(capacity))

    def acquire(self, keys: Sequence[Key]) -> list[Key]:
        """Takes a row for each of `keys`; returns those whose row is to be written.

        Raises ResourceError, with nothing taken, if there are not enough.
        """
        new = [key for key in keys if key not in self._rows]
        kept = sum(key in self._idle for key in keys)
        free = len(self._never_used) + len(self._idle) - kept
        if len(new) > free:
            raise ResourceError(
                f"conditioning tables: {len(new)} rows are needed and {free} of {self.capacity} "
                "are free; wait for other requests to finish, or use fewer steps"
            )
        for key in keys:
            self._idle.pop(key, None)
        for key in new:
            if self._never_used:
                self._rows[key] = self._never_used.popleft()
            else:
                old, _ = self._idle.popitem(last=False)
                self._rows[key] = self._rows.pop(old)
        self._users.update(keys)
        return new

    def release(self, keys: Iterable[Key], *, written: bool = True) -> None:
        """Once for each `acquire`; a row that was never written is forgotten."""
        for key in keys:
            self._users[key] -= 1
            if self._users[key]:
                continue
            del self._users[key]
            if written:
                self._idle[key] = None
            else:
                self._never_used.append(self._rows.pop(key))

    def row(self, key: Key) -> int:
        return self._rows[key]

    @property
    def in_use(self) -> int:
        return len(self._users)


@dataclass
class Lease:
    """Rows that are one request's until it gives them back."""

    texts: list[TextKey]
    modulation: list[ModulationKey]
    calls: int = 0  # of engines, to compute what was not there
    released: bool = False


@dataclass(frozen=True)
class Computed:
    """All rows of some samples, on the host."""

    texts: list[TextKey]
    modulation: list[ModulationKey]
    projected: Arrays
    modulated: Arrays
    calls: int


class Tables:
    """Buffers of the denoiser's T and U axes.

    `prepare` computes on any one thread; what it computed reaches the device in `flush`, on the
    thread that owns the denoiser and before its next call.
    """

    def __init__(self, config: GenTronConfig, engine: Engine, *, modulation: int, texts: int):
        """Capacities in rows: `modulation` one for each distinct (text, timestep), `texts`."""
        self._config, self._engine = config, engine
        self.modulation: Pages[ModulationKey] = Pages(modulation)
        self.texts: Pages[TextKey] = Pages(texts)
        self.buffers: dict[str, Buffer] = {}
        for spec in engine.component.inputs:
            if spec.axes[0] in ("T", "U"):
                rest = tuple(axis for axis in spec.axes[1:] if isinstance(axis, int))
                count = modulation if spec.axes[0] == "T" else texts
                self.buffers[spec.name] = engine.buffer(spec.name, (count, *rest))
        self._lock = threading.Lock()
        self._posted: deque[tuple[str, int, npt.NDArray[np.generic]]] = deque()

    def prepare(
        self, engines: Mapping[str, Engine], conditioning: Conditioning, size: Size | None
    ) -> Lease:
        """Takes rows for all that `conditioning` names and computes those that are missing.

        `size` is (H, W) in pixels, for models conditioned on it. Raises ResourceError if the
        tables are full, NonFiniteError for values that are not finite; then nothing is taken.
        """
        size = size if self._config.size_conditioning else None
        texts, rows = _keyed(conditioning, size)
        lease = Lease(list(texts), list(rows))
        with self._lock:
            new_texts = self.texts.acquire(lease.texts)
            try:
                new_rows = self.modulation.acquire(lease.modulation)
            except ResourceError:
                self._return(self.texts, lease.texts, new_texts)
                raise
        try:
            projected, calls = project(self._config, engines, [texts[key] for key in new_texts])
            modulated, more = condition(self._config, engines, [rows[k] for k in new_rows], size)
        except BaseException:
            with self._lock:
                self._return(self.texts, lease.texts, new_texts)
                self._return(self.modulation, lease.modulation, new_rows)
            raise
        lease.calls = calls + more
        self._post(projected, [self.texts.row(key) for key in new_texts])
        self._post(modulated, [self.modulation.row(key) for key in new_rows])
        return lease

    def put(self, computed: Computed) -> Lease:
        """`prepare` for tables that are empty and large enough, with rows computed beforehand."""
        lease = Lease(list(computed.texts), list(computed.modulation), computed.calls)
        self.texts.acquire(lease.texts)
        self.modulation.acquire(lease.modulation)
        self._post(computed.projected, [self.texts.row(key) for key in lease.texts])
        self._post(computed.modulated, [self.modulation.row(key) for key in lease.modulation])
        return lease

    def release(self, lease: Lease) -> None:
        """Idempotent; from any thread."""
        with self._lock:
            if not lease.released:
                lease.released = True
                self.texts.release(lease.texts)
                self.modulation.release(lease.modulation)

    def flush(self) -> None:
        """Writes what was prepared. On the thread that owns the denoiser."""
        while self._posted:
            name, row, values = self._posted.popleft()
            self.buffers[name].write_rows(row, values)

    @staticmethod
    def _return(pages: Pages[Key], keys: list[Key], new: list[Key]) -> None:
        pages.release([key for key in keys if key not in new])
        pages.release(new, written=False)

    def _post(self, values: Arrays, rows: Sequence[int]) -> None:
        """Rows that lie together are written together."""
        if not rows:
            return
        starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            for name, table in values.items():
                self._posted.append((name, rows[start], table[start:end]))


class RowNumbers:
    """Of the samples of one picture size in the tables; what `pack` asks."""

    def __init__(self, config: GenTronConfig, tables: Tables, size: Size | None):
        self._pooled = config.pooled_width > 0
        self._size = size if config.size_conditioning else None
        self._tables = tables

    def text_row(self, text: EncodedText) -> int:
        return self._tables.texts.row(text.prompt)

    def modulation_row(self, text: EncodedText, time: float) -> int:
        key = (text.prompt if self._pooled else None, time, self._size)
        return self._tables.modulation.row(key)


def compute(
    config: GenTronConfig,
    engines: Mapping[str, Engine],
    conditioning: Conditioning,
    size: Size | None,
) -> Computed:
    """All that `conditioning` names. Raises NonFiniteError."""
    size = size if config.size_conditioning else None
    texts, rows = _keyed(conditioning, size)
    projected, calls = project(config, engines, list(texts.values()))
    modulated, more = condition(config, engines, list(rows.values()), size)
    return Computed(list(texts), list(rows), projected, modulated, calls + more)


def _keyed(
    conditioning: Conditioning, size: Size | None
) -> tuple[dict[TextKey, EncodedText], dict[ModulationKey, tuple[EncodedText, float]]]:
    texts = {text.prompt: text for text in conditioning.texts}
    rows: dict[ModulationKey, tuple[EncodedText, float]] = {
        (text.prompt if conditioning.pooled else None, time, size): (text, time)
        for text, time in conditioning.modulation
    }
    return texts, rows


def project(
    config: GenTronConfig, engines: Mapping[str, Engine], texts: Sequence[EncodedText]
) -> tuple[Arrays, int]:
    """Keys and values of every cross-attention for `texts`, and the number of engine calls."""
    if not texts or "text_projection" not in engines:
        return {}, 0
    feeds: Arrays = {}
    for i in range(len(config.text)):
        feeds[f"hidden_{i + 1}"] = np.stack([text.hidden[i] for text in texts])
        feeds[f"mask_{i + 1}"] = np.stack([text.mask[i] for text in texts])
    values: Arrays = dict(engines["text_projection"].run(feeds))
    for table in values.values():
        check_finite(table, "text_projection")
    return values, 1


def condition(
    config: GenTronConfig,
    engines: Mapping[str, Engine],
    rows: Sequence[tuple[EncodedText, float]],
    size: Size | None,
) -> tuple[Arrays, int]:
    """Modulation rows of (text, timestep), and the number of engine calls."""
    chunks: list[Arrays] = []
    for start in range(0, len(rows), MODULATION_CHUNK):
        part = rows[start : start + MODULATION_CHUNK]
        feeds: Arrays = {"timesteps": np.asarray([time for _, time in part], np.float32)}
        if config.pooled_width:
            feeds["pooled"] = np.stack([_pooled(text.pooled) for text, _ in part])
        if config.size_conditioning:
            assert size is not None
            feeds["size"] = np.tile(np.asarray(size, np.float32), (len(part), 1))
        chunks.append(dict(engines["conditioner"].run(feeds)))
    if not chunks:
        return {}, 0
    values = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    for table in values.values():
        check_finite(table, "conditioner")
    return values, len(chunks)


def _pooled(values: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    assert values is not None
    return values
