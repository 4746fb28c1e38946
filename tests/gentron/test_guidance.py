"""Guidance as data against equation 6 written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gentron.errors import RequestError
from gentron.guidance import Branch, guidance_branches

scales = st.floats(-20.0, 20.0, allow_nan=False)


def equation_6(
    unguided: np.ndarray, moving: np.ndarray, full: np.ndarray, text: float, motion: float
) -> np.ndarray:
    """e(0,0) + lT (e(cT,cM) - e(0,cM)) + lM (e(0,cM) - e(0,0)), as the paper prints it."""
    return np.asarray(unguided + text * (full - moving) + motion * (moving - unguided))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=scales, motion=scales, seed=st.integers(0, 2**32 - 1))
def test_the_weighted_sum_of_the_branches_is_equation_6(
    text: float, motion: float, seed: int
) -> None:
    outputs = np.random.default_rng(seed).standard_normal((3, 2, 4, 3, 3))
    of = {(False, False): outputs[0], (False, True): outputs[1], (True, True): outputs[2]}
    branches = guidance_branches(text, motion, moving=True)
    ours = sum(branch.weight * of[branch.text, branch.motion] for branch in branches)
    # Both sides round a few times at the size of the largest term.
    np.testing.assert_allclose(ours, equation_6(*outputs, text, motion), rtol=0, atol=1e-12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=scales, motion=scales, moving=st.booleans())
def test_weights_sum_to_1_and_none_is_0(text: float, motion: float, moving: bool) -> None:
    branches = guidance_branches(text, motion, moving=moving)
    assert 1 <= len(branches) <= 3
    assert math.fsum(branch.weight for branch in branches) == pytest.approx(1.0, abs=1e-13)
    assert all(branch.weight != 0 for branch in branches)
    assert len({(branch.text, branch.motion) for branch in branches}) == len(branches)


def test_the_papers_scales_give_three_branches() -> None:
    """Section 3.3.2: lambda_T = 7.5, lambda_M in 1.0 to 1.3."""
    branches = guidance_branches(7.5, 1.3, moving=True)
    assert [(branch.text, branch.motion) for branch in branches] == [
        (False, False),
        (False, True),
        (True, True),
    ]
    assert [branch.weight for branch in branches] == pytest.approx([-0.3, -6.2, 7.5])
    assert sum(abs(branch.weight) for branch in branches) == pytest.approx(14.0)


ROWS = [
    (7.5, 1.0, [(False, True), (True, True)]),
    (7.5, 1.3, [(False, False), (False, True), (True, True)]),
    (1.0, 1.0, [(True, True)]),
    (1.0, 1.3, [(False, False), (False, True), (True, True)]),
    (3.0, 3.0, [(False, False), (True, True)]),  # e(0,0) + 3 (e(cT,cM) - e(0,0))
    (0.0, 1.3, [(False, False), (False, True)]),
    (0.0, 1.0, [(False, True)]),  # no text at all
    (0.0, 0.0, [(False, False)]),
]


@pytest.mark.parametrize(("text", "motion", "rows"), ROWS)
def test_a_branch_of_weight_0_gets_no_row(
    text: float, motion: float, rows: list[tuple[bool, bool]]
) -> None:
    branches = guidance_branches(text, motion, moving=True)
    assert [(branch.text, branch.motion) for branch in branches] == rows


@pytest.mark.parametrize("motion", [1.0, 1.3, 0.0, -2.0])
def test_an_image_is_guided_by_its_text_alone(motion: float) -> None:
    """One frame is the motion-free case, so e(0,cM) is e(0,0) and lambda_M drops out."""
    assert guidance_branches(7.5, motion, moving=False) == (
        Branch(-6.5, text=False, motion=True),
        Branch(7.5, text=True, motion=True),
    )
    (alone,) = guidance_branches(1.0, motion, moving=False)
    assert alone == Branch(1.0, text=True, motion=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["guidance", "motion"])
@pytest.mark.parametrize("moving", [True, False])
def test_a_scale_that_is_not_finite_is_refused_by_name(
    value: float, field: str, moving: bool
) -> None:
    arguments = {"guidance": 7.5, "motion": 1.2, field: value}
    with pytest.raises(RequestError, match=f"^{field}: must be a finite number") as caught:
        guidance_branches(**arguments, moving=moving)
    assert caught.value.field == field
