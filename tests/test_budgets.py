"""Budgets: exact sums, bounds, the ERK formula, and what cannot be reached."""

from __future__ import annotations

import re
from typing import Any

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


NAMED = [
    LayerSize((10, 10), 1, "stem.weight"),
    LayerSize((20, 10), 1, "blocks.0.weight"),
    LayerSize((30, 10), 1, "blocks.1.weight"),
    LayerSize((40, 10), 1, "blocks.2.weight"),
]


def test_a_dictionary_gives_layers_their_own_and_the_others_the_rest() -> None:
    distribution = {"blocks.0.*": 0.25, "stem.weight": 0.5}
    assert kept_total(NAMED, 0.7, 1000, distribution) == 300
    with pytest.raises(ValueError, match=r"sparsity 0.7 cannot be reached") as caught:
        kept_total(NAMED, 0.7, 1000, {**distribution, "blocks.*": 0.1})
    assert "only 0.17 can, as every weight is named" in str(caught.value)  # 0.5 of 100, 0.25 of 200, 0.1 of 700
    assert shares(NAMED, distribution) == [[0], [1], [2, 3]]
    assert distribute(NAMED, 300, distribution) == [50, 150, 100]


def test_a_dictionary_says_between_which_sparsities_it_can() -> None:
    distribution = {"blocks.0.weight": 0.5, "blocks.1.weight": 0.5}
    for sparsity in (0.9, 0.1):
        # half of 500 weights stay, and of the other 500 at least one and at most all
        with pytest.raises(ValueError, match=r"0\.25 to 0\.749 can"):
            kept_total(NAMED, sparsity, 1000, distribution)
    for sparsity in (0.25, 0.749):
        budgets = distribute(NAMED, kept_total(NAMED, sparsity, 1000, distribution), distribution)
        assert sum(budgets) == 1000 - round(1000 * sparsity)
        assert budgets[:2] == [100, 150]


def test_a_dictionary_of_all_layers_needs_their_sparsity() -> None:
    distribution = {"*": 1 / 3}
    with pytest.raises(ValueError, match=r"only 0\.333 can"):
        kept_total(NAMED, 0.5, 1000, distribution)
    assert distribute(NAMED, kept_total(NAMED, 0.333, 1000, distribution), distribution) == [67, 133, 200, 267]


@pytest.mark.parametrize(
    ("distribution", "error", "message"),
    [
        ({}, ValueError, "distribution must name at least one weight; got an empty dictionary"),
        ({"stem.weight": 1.0}, ValueError, r"sparsities in \[0, 1\); got 'stem.weight': 1.0"),
        ({"stem.weight": True}, ValueError, "got 'stem.weight': True"),
        ({"blocks.*": 0.5, "head.*": 0.5}, ValueError, r"distribution names 'head.\*', which matches no masked weight"),
        (
            {"*": 0.5, "blocks.*": 0.5},
            ValueError,
            r"distribution names 'blocks.\*', which matches no masked",
        ),
        (["stem.weight"], TypeError, "distribution must be a name or a dictionary of sparsities; got list"),
    ],
)
def test_dictionaries_that_cannot_be_are_refused(distribution: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shares(NAMED, distribution)


def test_budgets_of_costs_are_fractions_of_the_cost() -> None:
    layers = [LayerSize((10, 10), 2.5, "a", 250.0), LayerSize((10, 10), 0.5, "b", 50.0)]
    kept = kept_total(layers, 0.75, 300.0, "global")
    assert kept == 75.0
    assert distribute(layers, kept, "global") == [75.0]
    assert distribute(layers, kept, "uniform") == pytest.approx([62.5, 12.5])
    assert distribute(layers, kept, "erk") == pytest.approx([62.5, 12.5])  # of one shape: one density
    assert distribute(layers, kept, {"b": 0.5}) == pytest.approx([25.0, 50.0])
    with pytest.raises(ValueError, match=r"300 of the 300 counted cost are masked .* at most 0\.99 can"):
        kept_total(layers, 0.995, 300.0, "uniform")
