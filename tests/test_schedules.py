"""Schedules at their ends, outside them, and between."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spartan.methods.schedules import Cosine, Cubic, Exponential, Linear

RAMPS = [Linear, Cubic, Cosine]


@pytest.mark.parametrize("ramp", RAMPS)
def test_ends_are_exact_and_held(ramp: type[Linear]) -> None:
    schedule = ramp(1.0, 0.1, 10, 20)
    assert [schedule(step) for step in (0, 10)] == [1.0, 1.0]
    assert [schedule(step) for step in (20, 1000)] == [0.1, 0.1]


def test_known_values() -> None:
    assert Linear(0.0, 8.0, 10, 14)(11) == 2.0
    assert Cubic(0.0, 1.0, 0, 4)(2) == 1 - 0.5**3
    assert math.isclose(Cosine(0.0, 2.0, 0, 3)(1), 0.5)
    faded = Exponential(1.0, 0.0, 10, 20, 3.0)
    assert [faded(step) for step in (10, 20)] == [1.0, 0.0] and math.isclose(faded(15), math.exp(-1.5))


@given(st.sampled_from(RAMPS), st.floats(0, 1), st.floats(0, 1), st.integers(0, 50), st.integers(0, 50))
def test_ramps_are_monotone_between_their_ends(
    ramp: type[Linear], start: float, end: float, begin: int, length: int
) -> None:
    values = [ramp(start, end, begin, begin + length)(step) for step in range(begin + length + 2)]
    direction = 1 if end >= start else -1
    assert all(direction * (b - a) >= -1e-12 for a, b in itertools.pairwise(values))
    assert all(min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12 for value in values)


def test_a_ramp_of_no_length_is_a_jump() -> None:
    schedule = Linear(1.0, 2.0, 5, 5)
    assert (schedule(4), schedule(5)) == (1.0, 2.0)


def test_end_before_begin_is_refused() -> None:
    with pytest.raises(ValueError, match="end_step must be at least begin_step 5; got 4"):
        Linear(0.0, 1.0, 5, 4)


def test_schedules_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Linear(1.0, 0.1, 10, 20).start = 2.0  # type: ignore[misc]
