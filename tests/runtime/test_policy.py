"""Who goes next: claims about any table of requests, by simulating the policy as it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gentron.runtime.policy import Choice, Entry, Limits, Turns, choose

CLIENTS, SHAPES = ("a", "b", "c"), ("image", "video")


@dataclass
class World:
    """Requests under a policy. A call takes `seconds` for each unit of work."""

    limits: Limits
    seconds: float = 0.001
    now: float = 0.0
    turns: Turns = field(default_factory=Turns)
    table: dict[int, Entry] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    served: dict[str, float] = field(default_factory=dict)  # units, by client
    calls: list[list[Entry]] = field(default_factory=list)

    def call(self) -> Choice:
        """One turn: expire, start, step."""
        cost = lambda shape, units: self.seconds * units  # noqa: E731
        choice = choose(list(self.table.values()), self.turns, self.limits, self.now, cost)
        self.turns = choice.turns
        for number in choice.expired:
            self.ended[number] = "expired"
            del self.table[number]
        for number in choice.start:
            self.table[number] = replace(self.table[number], started=True, ready=True)
        stepped = [self.table[number] for number in choice.step]
        self.calls.append(stepped)
        self.now += self.seconds * sum(entry.units for entry in stepped) or self.seconds
        for entry in stepped:
            self.served[entry.client] = self.served.get(entry.client, 0) + entry.units
            left = entry.steps_left - 1
            self.table[entry.id] = replace(entry, steps_left=left, due=choice.due[entry.id])
            if not left:
                self.ended[entry.id] = "done"
                del self.table[entry.id]
        return choice


@st.composite
def entries(draw, number: int) -> Entry:
    video = draw(st.booleans())
    samples = draw(st.integers(1, 3))
    return Entry(
        id=number,
        client=draw(st.sampled_from(CLIENTS)),
        shape=SHAPES[video],
        samples=samples,
        units=float(samples * (8 if video else 1) * draw(st.integers(1, 3))),
        steps_left=draw(st.integers(1, 12)),
        arrived=draw(st.floats(0, 2)),
        memory=(samples * (8 if video else 1), draw(st.integers(1, 10))),
        priority=draw(st.integers(-2, 2)),
        deadline=draw(st.none() | st.floats(0.01, 5)),
    )


@st.composite
def tables(draw) -> list[Entry]:
    return [draw(entries(number)) for number in range(draw(st.integers(1, 14)))]


limits = st.builds(
    Limits,
    samples=st.integers(3, 8),
    memory=st.tuples(st.integers(24, 60), st.integers(10, 40)),
    units=st.sampled_from([1.0, 8.0, 24.0, float("inf")]).map(lambda most: lambda shape: most),
    requests=st.integers(1, 8),
)


@settings(deadline=None, max_examples=50)
@given(tables(), limits)
def test_every_request_ends_and_within_the_calls_that_all_of_them_need(table, limits):
    world = World(limits, table={entry.id: entry for entry in table})
    needed = sum(entry.steps_left for entry in table)
    for _ in range(needed + len(table) + 2):
        world.call()
    assert set(world.ended) == {entry.id for entry in table}
    for entry in table:
        if entry.deadline is None:
            assert world.ended[entry.id] == "done"


@settings(deadline=None, max_examples=50)
@given(tables(), limits)
def test_memory_and_counts_stay_within_their_limits(table, limits):
    world = World(limits, table={entry.id: entry for entry in table})
    while world.table:
        world.call()
        under_way = [entry for entry in world.table.values() if entry.started]
        for index, most in enumerate(limits.memory):
            assert sum(entry.memory[index] for entry in under_way) <= most
        assert len(under_way) <= limits.requests
        for shape in SHAPES:
            together = sum(entry.samples for entry in under_way if entry.shape == shape)
            assert together <= limits.samples


@settings(deadline=None, max_examples=50)
@given(tables(), limits)
def test_a_call_holds_one_shape_and_no_more_units_than_allowed_or_one_request(table, limits):
    world = World(limits, table={entry.id: entry for entry in table})
    while world.table:
        world.call()
        call = world.calls[-1]
        assert len({entry.shape for entry in call}) <= 1
        assert len({entry.id for entry in call}) == len(call)
        if len(call) > 1:
            assert sum(entry.units for entry in call) <= limits.units(call[0].shape)


@settings(deadline=None, max_examples=40)
@given(tables(), limits)
def test_what_waits_never_keeps_a_call_empty(table, limits):
    world = World(limits, table={entry.id: replace(entry, deadline=None) for entry in table})
    while world.table:
        choice = world.call()
        assert choice.step or choice.start


@settings(deadline=None, max_examples=40)
@given(tables(), limits, st.sets(st.integers(0, 13)), st.integers(0, 20))
def test_the_same_table_gives_the_same_choice_and_the_cancelled_are_not_in_it(
    table, limits, cancelled, after
):
    world = World(limits, table={entry.id: entry for entry in table})
    for _ in range(after):
        world.call()
    world.table = {n: entry for n, entry in world.table.items() if n not in cancelled}
    before = (list(world.table.values()), world.turns, limits, world.now)
    first, second = choose(*before), choose(*before)
    assert first == second
    assert not cancelled & {*first.step, *first.start, *first.expired}


def backlog(client: str, first: int, count: int, **changes) -> list[Entry]:
    plain = Entry(0, client, "image", 1, 4.0, 1000, 0.0, started=True, ready=True)
    return [replace(plain, id=first + k, **changes) for k in range(count)]


def served_after(calls: int, *tables: list[Entry], units: float = 4.0) -> dict[str, float]:
    world = World(Limits(1000, units=lambda shape: units))
    world.table = {entry.id: entry for table in tables for entry in table}
    for _ in range(calls):
        world.call()
    return world.served


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(1, 20), st.floats(1, 20))
def test_clients_with_work_get_equal_shares_however_much_of_it_they_send(few, many, one, other):
    """Where calls have room for one: with more room both may get all that they can use."""
    served = served_after(
        200, backlog("a", 0, few, units=one), backlog("b", 100, many, units=other), units=0.0
    )
    assert abs(served["a"] - served["b"]) <= 3 * max(one, other)


def test_images_and_videos_of_two_clients_share_the_time_not_the_calls():
    served = served_after(
        900, backlog("a", 0, 3), backlog("b", 10, 2, shape="video", units=64.0), units=64.0
    )
    assert served["a"] == pytest.approx(served["b"], rel=0.15)


def test_within_a_client_an_image_is_not_held_up_by_the_steps_of_a_video():
    world = World(Limits(1000, units=lambda shape: 64.0))
    video = backlog("a", 0, 1, shape="video", units=64.0)
    world.table = {entry.id: entry for entry in (*video, *backlog("a", 1, 1, steps_left=12))}
    while 1 not in world.ended:
        world.call()
    assert sum(call[0].shape == "video" for call in world.calls) <= 2


@pytest.mark.parametrize("difference", [1, 2])
def test_each_step_of_priority_doubles_the_share(difference):
    served = served_after(
        1500, backlog("a", 0, 2, priority=difference), backlog("b", 10, 2), units=4.0
    )
    assert served["a"] / served["b"] == pytest.approx(2**difference, rel=0.1)


def test_who_rides_along_pays_for_it_later():
    """Two clients of one shape share calls; a third of another shape still gets a third."""
    third = backlog("c", 20, 1, shape="video", units=8.0)
    served = served_after(900, backlog("a", 0, 1), backlog("b", 10, 1), third, units=8.0)
    assert served["c"] / sum(served.values()) == pytest.approx(1 / 3, abs=0.05)


def test_a_new_request_takes_its_first_step_at_once_among_many_that_run():
    world = World(Limits(1000, units=lambda shape: 4.0))
    world.table = {entry.id: entry for entry in backlog("a", 0, 20)}
    for _ in range(50):
        world.call()
    world.table[99] = replace(backlog("a", 99, 1)[0], arrived=world.now)
    before = len(world.calls)
    while not any(entry.id == 99 for entry in world.calls[-1]):
        world.call()
    assert len(world.calls) - before <= 21


def test_what_is_nearly_late_goes_first_but_not_always():
    late = replace(backlog("a", 0, 1)[0], deadline=20.0, steps_left=4000)
    world = World(Limits(1000, units=lambda shape: 4.0))
    world.table = {entry.id: entry for entry in (late, *backlog("b", 1, 3))}
    for _ in range(200):
        world.call()
    share = sum(call[0].id == 0 for call in world.calls) / len(world.calls)
    assert 0.45 < share < 0.55


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones():
    world = World(Limits(1000, memory=(10,)), seconds=0.1)
    large = Entry(0, "a", "image", 1, 1.0, 5, 0.0, memory=(10,))
    world.table = {0: large}
    for number in range(1, 2000):
        if 0 in world.ended:
            break
        small = Entry(number, f"client {number}", "image", 1, 1.0, 2, world.now, memory=(6,))
        world.table[number] = small
        world.call()
    assert world.ended[0] == "done"
