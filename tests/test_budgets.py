"""Budgets: exact sums, bounds, the ERK formula, and what cannot be reached."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spartan.budgets import DISTRIBUTIONS, LayerSize, distribute, kept_total, shares

LAYERS = [LayerSize((300, 784), 1), LayerSize((100, 300), 1), LayerSize((32, 3, 3, 3), 1)]

layer_sizes = st.builds(LayerSize, st.tuples(st.integers(1, 60), st.integers(1, 60)), st.just(1)) | st.builds(
    LayerSize, st.tuples(st.integers(8, 30), st.integers(8, 30), st.just(3)), st.just(64)
)


@given(st.lists(layer_sizes, min_size=1, max_size=8), st.floats(0, 0.999), st.sampled_from(DISTRIBUTIONS))
def test_budgets_sum_exactly_within_bounds(layers: list[LayerSize], sparsity: float, distribution: str) -> None:
    count = sum(layer.count for layer in layers)
    floor = sum(max(layers[i].largest_block for i in group) for group in shares(layers, distribution))
    assume(count - round(sparsity * count) >= floor)
    kept = kept_total(layers, sparsity, count, distribution)
    budgets = distribute(layers, kept, distribution)
    assert sum(budgets) == kept == count - round(sparsity * count)
    for budget, group in zip(budgets, shares(layers, distribution), strict=True):
        assert max(layers[i].largest_block for i in group) <= budget
        assert budget <= sum(layers[i].count for i in group)


def test_uniform_keeps_the_same_fraction_everywhere() -> None:
    total = sum(layer.count for layer in LAYERS)
    for layer, budget in zip(LAYERS, distribute(LAYERS, total // 5, "uniform"), strict=True):
        assert abs(budget / layer.count - 0.2) <= 2 / layer.count


def test_erk_follows_its_formula_where_it_is_not_capped() -> None:
    total = sum(layer.count for layer in LAYERS)
    budgets = distribute(LAYERS, total // 4, "erk")
    assert budgets[2] == LAYERS[2].count  # by the formula its density would be above 1
    scale = [budget / sum(layer.shape) for budget, layer in zip(budgets, LAYERS, strict=True)][:2]
    assert abs(scale[0] - scale[1]) <= 2 / 400


def test_unreachable_sparsity_says_which_can_be_reached() -> None:
    layers = [LayerSize((10, 10), 1)]
    with pytest.raises(ValueError, match=r"sparsity 0.9 cannot be reached") as caught:
        kept_total(layers, 0.9, 200, "global")
    reachable = float(re.findall(r"at most ([0-9.]+) can", str(caught.value))[0])
    assert reachable == 0.495
    assert kept_total(layers, reachable, 200, "global") == 1


def test_each_budget_keeps_a_block() -> None:
    layers = [LayerSize((64, 64), 256), LayerSize((16, 16), 256)]
    with pytest.raises(ValueError, match="keep at least one block each"):
        kept_total(layers, 0.95, 4352, "uniform")
    assert distribute(layers, kept_total(layers, 0.88, 4352, "uniform"), "uniform") == [266, 256]


def test_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="distribution must be one of global, uniform, erk; got 'local'"):
        shares(LAYERS, "local")
