"""Who may start and who takes the next step: pure functions of a table of requests.

Between clients deficit round robin (Shreedhar and Varghese 1995) over units of work, within a
client least work first. A call is led by one request; others of its latent shape ride along as far
as batching pays. Nothing here knows engines, clocks or threads, so it is simulated as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

PATIENCE = 10.0  # seconds of waiting that one step of priority is worth, when starting
PRIORITIES = range(-2, 3)  # each next one has twice the share
URGENT = 1.5  # times the work that is left: closer to the deadline a request goes first
DEBT = 8.0  # calls' worth of work that a client can be behind, for what rode along


@dataclass(frozen=True)
class Entry:
    """One request, as the policy sees it."""

    id: int
    client: str
    shape: Hashable  # of its latents; calls hold one shape
    samples: int
    units: float  # work of one step: tokens x frames x rows
    steps_left: int
    arrived: float  # seconds, on the clock of `now`
    memory: tuple[int, ...] = ()  # what it holds from start to end, of each resource
    priority: int = 0
    deadline: float | None = None
    started: bool = False  # holds its memory
    ready: bool = False  # may take a step
    due: float | None = None  # virtual time of its next step, among its client's; None: new

    @property
    def weight(self) -> float:
        return 2.0**self.priority


@dataclass(frozen=True)
class Limits:
    samples: int  # of one shape that may be under way at once
    memory: tuple[int, ...] = ()  # of each resource of `Entry.memory`
    units: Callable[[Hashable], float] = lambda shape: float("inf")  # of one call; the lead always
    samples_per_call: int = 1 << 30
    requests: int = 1 << 30  # under way at once


@dataclass(frozen=True)
class Turns:
    """What is remembered from call to call: the ring of clients and what each has saved up."""

    ring: tuple[str, ...] = ()
    deficit: Mapping[str, float] = field(default_factory=dict)
    urgent_last: bool = False


@dataclass(frozen=True)
class Choice:
    expired: tuple[int, ...]  # their deadline has passed
    start: tuple[int, ...]
    step: tuple[int, ...]  # of one shape; the first leads
    due: Mapping[int, float]  # of those that step, from now on
    turns: Turns


def choose(
    entries: Sequence[Entry],
    turns: Turns,
    limits: Limits,
    now: float,
    seconds: Callable[[Hashable, float], float] = lambda shape, units: 0.0,
) -> Choice:
    """`seconds` says how long a call of so many units of a shape takes."""
    expired = [e for e in entries if e.deadline is not None and e.deadline <= now]
    gone = {entry.id for entry in expired}
    alive = [entry for entry in entries if entry.id not in gone]
    start = starters(alive, limits, now)
    ready = [entry for entry in alive if entry.ready]
    step, turns = _steppers(ready, turns, limits, now, seconds)
    return Choice(
        expired=tuple(entry.id for entry in expired),
        start=tuple(entry.id for entry in start),
        step=tuple(entry.id for entry in step),
        due=_next_dues(step, ready),
        turns=turns,
    )


def starters(entries: Iterable[Entry], limits: Limits, now: float) -> list[Entry]:
    """Waiting requests that fit now: first of clients with the least work under way, and before
    all others the one that has waited longest, if that is long.

    Where one does not fit, none that came later may take the memory that it waits for.
    """
    entries = list(entries)
    waiting = [entry for entry in entries if not entry.started]
    load: dict[str, float] = {}
    held = [0] * len(limits.memory)
    samples: dict[Hashable, int] = {}
    requests = 0

    def add(entry: Entry) -> None:
        nonlocal requests
        requests += 1
        work = entry.units * entry.steps_left / entry.weight
        load[entry.client] = load.get(entry.client, 0.0) + work
        samples[entry.shape] = samples.get(entry.shape, 0) + entry.samples
        for index, amount in enumerate(entry.memory):
            held[index] += amount

    for entry in entries:
        if entry.started:
            add(entry)
    chosen: list[Entry] = []
    full: set[Hashable] = set()
    while waiting and requests < limits.requests:
        candidates = [entry for entry in waiting if entry.shape not in full]
        if not candidates:
            break
        oldest = min(candidates, key=lambda e: (e.arrived, e.id))
        entry = min(candidates, key=lambda e: (load.get(e.client, 0.0), _since(e), e.id))
        if now - oldest.arrived > PATIENCE * len(PRIORITIES):
            entry = oldest
        if samples.get(entry.shape, 0) + entry.samples > limits.samples:
            full.add(entry.shape)
            continue
        if any(
            has + more > most
            for has, more, most in zip(held, entry.memory, limits.memory, strict=True)
        ):
            break
        waiting.remove(entry)
        chosen.append(entry)
        add(entry)
    return chosen


def _since(entry: Entry) -> float:
    """Arrival, as if those of higher priority had waited longer."""
    return entry.arrived - entry.priority * PATIENCE


def _steppers(
    ready: Sequence[Entry],
    turns: Turns,
    limits: Limits,
    now: float,
    seconds: Callable[[Hashable, float], float],
) -> tuple[list[Entry], Turns]:
    if not ready:
        return [], Turns()
    urgent = {
        entry.id
        for entry in ready
        if entry.deadline is not None
        and now + URGENT * entry.steps_left * seconds(entry.shape, entry.units) >= entry.deadline
    }
    clients: dict[str, list[Entry]] = {}
    for entry in ready:
        clients.setdefault(entry.client, []).append(entry)
    for own in clients.values():
        start = _start_of(own)
        own.sort(key=lambda e: _rank(e, start))
    ring = [client for client in turns.ring if client in clients]
    ring += [client for client in clients if client not in ring]
    deficit = {client: turns.deficit.get(client, 0.0) for client in ring}
    hurried = [entry for entry in ready if entry.id in urgent]
    if hurried and not (turns.urgent_last and len(hurried) < len(ready)):
        lead = min(hurried, key=lambda e: (e.deadline, e.arrived, e.id))
    else:
        hurried = []
        lead, ring = _lead(clients, ring, deficit)
    order = _riders(clients, ring, deficit, urgent, lead)
    step = _fill(lead, order, limits)
    most = max(entry.units for entry in ready)
    for entry in step:
        deficit[entry.client] -= entry.units
    deficit = {client: max(value, -DEBT * most) for client, value in deficit.items()}
    return step, replace(turns, ring=tuple(ring), deficit=deficit, urgent_last=bool(hurried))


def _lead(
    clients: Mapping[str, list[Entry]], ring: list[str], deficit: dict[str, float]
) -> tuple[Entry, list[str]]:
    """Deficit round robin: the client at the head of the ring goes on while it has saved enough,
    then it is the next one's turn, which gets a quantum by its weight."""
    quantum = max(own[0].units for own in clients.values())
    ring = list(ring)
    while True:
        head = clients[ring[0]][0]
        if deficit[ring[0]] >= head.units:
            return head, ring
        ring = [*ring[1:], ring[0]]
        deficit[ring[0]] += quantum * clients[ring[0]][0].weight


def _riders(
    clients: Mapping[str, list[Entry]],
    ring: Sequence[str],
    deficit: Mapping[str, float],
    urgent: set[int],
    lead: Entry,
) -> list[Entry]:
    """Those of the lead's shape in the order in which they may ride along: a client's second only
    after every other client's first."""
    ranked = []
    for turn, client in enumerate(ring):
        own = [e for e in clients[client] if e.shape == lead.shape and e is not lead]
        for index, entry in enumerate(own):
            ranked.append((entry.id not in urgent, index, -deficit[client], turn, entry))
    return [entry for *_, entry in sorted(ranked, key=lambda item: item[:4])]


def _fill(lead: Entry, order: Sequence[Entry], limits: Limits) -> list[Entry]:
    step, units, samples = [lead], lead.units, lead.samples
    most = limits.units(lead.shape)
    for entry in order:
        fits = samples + entry.samples <= limits.samples_per_call
        if fits and units + entry.units <= most:
            step.append(entry)
            units += entry.units
            samples += entry.samples
    return step


def _rank(entry: Entry, start: float) -> tuple[float, bool, float, int]:
    """A first step comes before those of others that are as far: who waits for it sees nothing."""
    due = start if entry.due is None else entry.due
    return due, entry.due is not None, entry.arrived, entry.id


def _start_of(own: Sequence[Entry]) -> float:
    """The virtual time at which a new request of this client begins: level with the others."""
    return min((entry.due for entry in own if entry.due is not None), default=0.0)


def _next_dues(step: Sequence[Entry], ready: Sequence[Entry]) -> dict[int, float]:
    dues = {}
    for entry in step:
        start = _start_of([other for other in ready if other.client == entry.client])
        at = start if entry.due is None else entry.due
        dues[entry.id] = at + entry.units / entry.weight
    return dues
