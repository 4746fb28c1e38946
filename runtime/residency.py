"""Which engines are in memory: all of them, or under a limit one after the other.

A request uses its components in turn: text encoders, text projection, conditioner, denoiser,
decoder. Where they do not all fit, each is loaded when its turn comes and those used longest ago
are freed for it. What the largest needs is known before anything is loaded.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from gentron.bundle import Bundle
from gentron.contract import PRECISIONS, Component
from gentron.engines import Engine
from gentron.engines.base import Backend, EngineInfo
from gentron.engines.host_memory import available_bytes, give_back
from gentron.errors import BackendError, ResourceError
from gentron.weights import stored_tensors

log = logging.getLogger(__name__)

# An engine's memory by that of its weights: packed copies of some, and room to work.
ENGINE_FACTOR = 1.3
ITEM_BYTES = {"bfloat16": 2}
# A whole run of `g2` whose peak is a streamed T5-XXL, mapped files included, by T5-XXL's weights in
# float32: 0.92 (docs/performance.md).
STREAMED_FACTOR = 0.95
FREE_SHARE = 0.9  # of the free memory that a bundle may take


def component_bytes(bundle: Bundle, name: str, precision: str) -> int:
    """An estimate of a loaded component's memory in bytes: its weights in the type that they are
    computed in, and `ENGINE_FACTOR`."""
    component, compute = bundle.components[name], PRECISIONS[precision]
    item = ITEM_BYTES.get(compute) or np.dtype(compute).itemsize
    tensors = stored_tensors(bundle.path / component.folder)
    values = sum(math.prod(t.shape) for n, t in tensors.items() if _reads(bundle, component, n))
    return int(values * item * ENGINE_FACTOR)


class MemoryPlan(NamedTuple):
    """Empty where everything is loaded at once."""

    sizes: dict[str, int]
    limit: int | None
    streamed: frozenset[str]  # text encoders that are over the limit by themselves
    making: dict[str, int]  # bytes that each takes while it is compiled, at the most


NOTHING = MemoryPlan({}, None, frozenset(), {})


def plan_memory(
    bundle: Bundle, backend: Backend, precisions: Mapping[str, str], limit: int | None
) -> MemoryPlan:
    """What is loaded how, under a limit in bytes; where there is none and the engines are in the
    machine's own memory, under what is free there, if they do not all fit."""
    if limit is None and not backend.streams:
        return NOTHING
    sizes = {
        name: component_bytes(bundle, name, p if p in PRECISIONS else "fp32")
        for name, p in precisions.items()
    }
    if limit is None:
        room, all_of_it = available_bytes(), sum(sizes.values())
        if room is None or all_of_it <= room * FREE_SHARE:
            return NOTHING
        limit = int(room * FREE_SHARE)
        log.warning("components take %.1f GB together and %.1f GB are free: each is loaded when "
                    "its turn comes", all_of_it / 1e9, room / 1e9)  # fmt: skip
    over = {n for n, size in sizes.items() if n.startswith("text_encoder") and size > limit}
    streamed = frozenset(over if backend.streams else ())
    for name in streamed:
        log.warning("%s needs about %.1f GB: it reads its weights anew for every prompt",
                    name, sizes[name] / 1e9)  # fmt: skip
        sizes[name] = int(component_bytes(bundle, name, "fp32") / ENGINE_FACTOR * STREAMED_FACTOR)
    making = {
        name: int(component_bytes(bundle, name, "fp32") / ENGINE_FACTOR * backend.compile_factor)
        for name in sizes.keys() - streamed
    }
    return MemoryPlan(sizes, limit, streamed, making)


def check_room_beside(name: str, precision: str | None) -> None:
    """Raises ResourceError if this machine has not the memory for a bundle beside what it holds
    now: the system would rather kill the process than say no."""
    bundle, room = Bundle.open(name), available_bytes()
    computed = precision if precision in PRECISIONS else "fp32"
    need = sum(component_bytes(bundle, part, computed) for part in bundle.components)
    if room is not None and need > room:
        raise ResourceError(
            f"memory: a second bundle takes about {need / 1e9:.1f} GB and {room / 1e9:.1f} GB are "
            "left; close other programs, or start the server anew with it"
        )


def _reads(bundle: Bundle, component: Component, tensor: str) -> bool:
    """Whether a tensor is the component's: those that share a folder have names of their own."""
    sharing = [c.name for c in bundle.components.values() if c.folder == component.folder]
    if component.name == "vae_decoder":  # its folder also holds the encoder
        return not tensor.startswith("encoder.")
    owner = tensor.partition(".")[0]
    return len(sharing) == 1 or owner == component.name or owner not in sharing


class Residency(Mapping[str, Engine]):
    """Engines by component name; `limit` in bytes frees those used longest ago."""

    def __init__(
        self,
        load: Callable[[str], Engine],
        names: Sequence[str],
        sizes: Mapping[str, int] | None = None,
        limit: int | None = None,
        making: Mapping[str, int] | None = None,
    ):
        """Loads everything at once unless there is a limit, which needs the `sizes`; `making` is
        what compiling takes while it lasts, where that is more. All in bytes. Raises ResourceError
        if the largest component alone is over the limit."""
        self._load, self._names = load, list(names)
        self._sizes, self._limit, self._making = dict(sizes or {}), limit, dict(making or {})
        self._resident: OrderedDict[str, Engine] = OrderedDict()
        self._pinned: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._infos: dict[str, EngineInfo] = {}
        self._closed = False
        if limit is None:
            try:
                for name in names:
                    self[name]
            except BaseException:
                self.close()
                raise
            return
        largest = max(names, key=self._sizes.__getitem__)
        if self._sizes[largest] > limit:
            raise ResourceError(
                f"memory: {largest} alone needs about {self._sizes[largest] / 1e9:.1f} GB, the "
                f"limit is {limit / 1e9:.1f} GB; raise the limit, or compute in fewer bits with "
                "--precision"
            )

    def __getitem__(self, name: str) -> Engine:
        with self._lock:
            self.check_open()
            if name not in self._names:
                raise KeyError(name)
            if name not in self._resident:
                self._make_room(name)
                self._resident[name] = self._load(name)
                self._infos[name] = self._resident[name].info
            self._resident.move_to_end(name)
            return self._resident[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def resident(self) -> tuple[str, ...]:
        """What is in memory now, used longest ago first."""
        return tuple(self._resident)

    @property
    def infos(self) -> tuple[EngineInfo, ...]:
        """Of every component that has been in memory, in the model's order."""
        return tuple(self._infos[name] for name in self._names if name in self._infos)

    def check_open(self) -> None:
        """Raises BackendError after `close`."""
        if self._closed:
            raise BackendError("the pipeline is closed; load the bundle again")

    @contextmanager
    def pinned(self, name: str) -> Iterator[None]:
        """Keeps a component in memory for a while: the denoiser during its loop."""
        with self._lock:
            self._pinned[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._pinned[name] -= 1

    def close(self) -> None:
        """Frees every engine; idempotent."""
        with self._lock:
            self._closed = True
            while self._resident:
                self._resident.popitem()[1].close()

    def _make_room(self, name: str) -> None:
        """Others go while there is not the room to make it; what it then holds must fit."""
        if self._limit is None:
            return
        allowed = self._limit - max(self._sizes[name], self._making.get(name, 0))
        for other in list(self._resident):
            if sum(self._sizes[n] for n in self._resident) <= allowed:
                return
            if not self._pinned[other]:
                self._resident.pop(other).close()
                give_back()
        held = sum(self._sizes[n] for n in self._resident)
        if held + self._sizes[name] > self._limit:
            raise ResourceError(
                f"memory: {name} needs about {self._sizes[name] / 1e9:.1f} GB beside "
                f"{held / 1e9:.1f} GB that a generation is using, the limit is "
                f"{self._limit / 1e9:.1f} GB; raise it, finish one generation before the next, "
                "or do without previews"
            )
