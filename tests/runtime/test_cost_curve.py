"""Measured calls, and what follows from them for the size of the next."""

from __future__ import annotations

import pytest

from gentron.runtime.cost_curve import UNKNOWN, CostCurve


def measured(**seconds: float) -> CostCurve:
    curve = CostCurve()
    for name, taken in seconds.items():
        for _ in range(4):
            curve.observe("image", float(name[1:]), taken)
    return curve


def test_between_measurements_lie_straight_lines_and_beyond_them_proportions():
    curve = measured(u100=1.0, u200=1.5)
    assert curve.seconds("image", 150) == pytest.approx(1.25)
    assert curve.seconds("image", 400) == pytest.approx(3.0)
    assert curve.per_unit("image") == pytest.approx(1.5 / 200)
    assert CostCurve().seconds("image", 100) == UNKNOWN


def test_where_batching_does_not_pay_the_smallest_call_is_the_best():
    assert measured(u100=1.0, u200=2.05, u400=4.2).best_units("image") == 100


def test_where_it_pays_up_to_a_point_calls_go_up_to_there():
    assert measured(u100=1.0, u200=1.2, u400=2.0, u800=4.1).best_units("image") == 400


def test_while_the_largest_is_the_best_there_is_no_limit():
    assert measured(u100=1.0, u200=1.2).best_units("image") == float("inf")
    assert CostCurve().best_units("image") == float("inf")


def test_the_first_call_of_a_size_and_a_single_lucky_one_decide_nothing():
    curve = measured(u100=1.0, u200=1.5)
    curve.observe("image", 50.0, 0.01)
    assert curve.best_units("image") == float("inf")
    curve.observe("image", 50.0, 0.01)
    assert curve.best_units("image") == float("inf")
    curve.observe("image", 400.0, 60.0)  # compiles
    curve.observe("image", 400.0, 2.0)
    assert curve.seconds("image", 400) == 2.0
