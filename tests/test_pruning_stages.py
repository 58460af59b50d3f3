"""Second stages of pruning: reconstruction by ADMM against least squares, swaps of DSnoT by hand."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import spartan
from tests.test_pruning import data, linear, mlp, refit, untouched

pytestmark = pytest.mark.usefixtures("one_thread")


def error_of(weight: torch.Tensor, dense: torch.Tensor, x: torch.Tensor) -> float:
    return float(((x @ (weight - dense).T) ** 2).sum() / ((x @ dense.T) ** 2).sum())


def test_reconstruction_is_the_least_squares_on_the_mask() -> None:
    module, x = linear(12, 7), data(50, 12)
    dense = module.weight.detach().clone()
    mask = torch.rand(7, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[3] = False
    method = spartan.ADMM({"weight": mask}, reselect=False, damping=0.0, steps=400, tolerance=1e-14)
    (row,) = spartan.prune(module, method, [x]).rows
    assert torch.equal(module.weight != 0, mask)
    for index in range(7):
        expected = refit(dense[index], x, mask[index])
        torch.testing.assert_close(module.weight[index].detach(), expected, rtol=1e-7, atol=1e-9)
    assert row.error == pytest.approx(error_of(module.weight.detach(), dense, x), rel=1e-9)
    assert row.error_before == pytest.approx(error_of(torch.where(mask, dense, 0.0), dense, x), rel=1e-9)
    assert row.error < row.error_before


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.5}, {"sparsity": 0.5, "block_size": (2, 3)}, {"pattern": (2, 4)}], ids=str
)
@pytest.mark.parametrize("kind", [spartan.Magnitude, spartan.Wanda, spartan.OBS])
def test_a_mask_that_changes_stays_within_the_budget_and_errs_less(kind: Any, settings: Any) -> None:
    x = data(60, 24)
    errors = []
    for reselect in (False, True):
        module = linear(24, 16)
        dense = module.weight.detach().clone()
        method = spartan.ADMM(kind(**settings), reselect=reselect, damping=1e-4)
        result = spartan.prune(module, method, [x], include="weight")
        assert result.sparsity == 0.5 and result.method == f"ADMM after {kind.__name__}"
        if "pattern" in settings:
            assert bool(((module.weight != 0).unflatten(1, (-1, 4)).sum(2) == 2).all())
        if "block_size" in settings:
            grid = (module.weight != 0).unflatten(1, (-1, 3)).unflatten(0, (-1, 2))
            assert torch.equal(grid.any(3).any(1), grid.all(3).all(1))
        # on the mask that it chose the values are the best there are
        gram = x.T @ x + 1e-4 * (x.T @ x).diagonal().mean() * torch.eye(24, dtype=torch.float64)
        gradient = (module.weight.detach() - dense) @ gram
        assert float(gradient[module.weight != 0].abs().max()) < 1e-3 * float((dense @ gram).abs().max())
        errors.append(error_of(module.weight.detach(), dense, x))
    assert errors[1] < errors[0]


def test_a_mask_that_changes_comes_near_the_best_of_all_masks() -> None:
    """Of 8 weights 4 stay, and all 70 masks are tried: the splitting errs less than the mask of magnitude."""
    sums = {"best": 0.0, False: 0.0, True: 0.0}
    for seed in range(12):
        x, module = data(40, 8, seed), linear(8, 1, seed)
        dense = module.weight.detach().clone()
        best = min(
            error_of(refit(dense[0], x, torch.tensor([i in kept for i in range(8)]))[None], dense, x)
            for kept in itertools.combinations(range(8), 4)
        )
        sums["best"] += best
        for reselect in (False, True):
            own = copy.deepcopy(module)
            method = spartan.ADMM(spartan.Magnitude(sparsity=0.5), reselect=reselect, damping=0.0, steps=200)
            spartan.prune(own, method, [x], include="weight")
            found = error_of(own.weight.detach(), dense, x)
            assert found >= best * (1 - 1e-6)
            sums[reselect] += found
    assert sums[True] - sums["best"] < 0.5 * (sums[False] - sums["best"]), sums


@pytest.mark.parametrize("method", [kind(sparsity=0.6) for kind in (spartan.Wanda, spartan.OBS, spartan.Magnitude)])
def test_stages_work_on_networks_and_follow_each_other(method: Any) -> None:
    x = [data(80, 20, seed, torch.float32) for seed in range(2)]
    errors = []
    for stage in (method, spartan.DSnoT(method), spartan.ADMM(spartan.DSnoT(method)), spartan.ADMM(method)):
        model = mlp(20, 32, 16)
        result = spartan.prune(model, stage, x, include="*.weight")
        zeros = sum(int((module.weight == 0).sum()) for module in model if isinstance(module, nn.Linear))
        assert zeros == round(0.6 * (20 * 32 + 32 * 16))
        errors.append(result.rows[0].error)
    assert errors[2] < errors[1] and errors[3] <= errors[0]


def test_convolutions_in_groups_are_reconstructed() -> None:
    torch.manual_seed(0)
    module, x = nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False).double(), torch.randn(4, 6, 9, 9).double().cumsum(2)
    before = module(x).detach()
    method = spartan.ADMM(spartan.Wanda(sparsity=0.5), damping=0.0)
    (row,) = spartan.prune(module, method, [x], include="weight").rows
    error = float(((module(x).detach() - before) ** 2).sum() / (before**2).sum())
    assert row.error == pytest.approx(error, rel=1e-6)
    assert row.error < 0.9 * row.error_before and row.sparsity == 0.5


def test_global_budgets_of_magnitude_are_compared_as_they_are_before_a_second_stage() -> None:
    x = [data(80, 20, dtype=torch.float32)]
    shares = []
    for method in (spartan.Magnitude(sparsity=0.6, distribution="global"),) * 2:
        stage = method if not shares else spartan.ADMM(method)
        shares.append([row.sparsity for row in spartan.prune(mlp(20, 32, 16), stage, x, include="*.weight").rows])
    assert shares[0] == shares[1]


# --- DSnoT -----------------------------------------------------------------------------------------------------------


def test_a_swap_by_hand() -> None:
    """Four inputs of means 1, 2, 0, 1; variances 1, 4, 1, 0.25."""
    x = torch.tensor([[0.0, 0.0, 1.0, 0.5], [2.0, 4.0, -1.0, 1.5]], dtype=torch.float64)
    module = linear(4, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 0.5, 3.0, -0.4]]))
    # The mask keeps 2 and 3. e = 1 * 1 + 0.5 * 2 = 2 > 0. Growing: w E / Var = 1 and 0.25: weight 0.
    # Dropping: of those kept that add less than 0 to the output only weight 3. Then e = 2 - 1 - 0.4 = 0.6.
    # Growing 1 next would make e = 0.6 - 1 = -0.4, but nothing is left that may be dropped.
    mask = torch.tensor([[False, False, True, True]])
    spartan.prune(module, spartan.DSnoT({"weight": mask}), [x])
    assert module.weight.tolist() == [[1.0, 0.0, 3.0, 0.0]]


def test_a_swap_that_would_not_help_is_not_made() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64)  # means 1, 2
    module = linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -2.0]]))
    mask = torch.tensor([[False, True]])  # e = 1; after a swap e = 0 - 4 = -4
    spartan.prune(module, spartan.DSnoT({"weight": mask}), [x])
    assert module.weight.tolist() == [[0.0, -2.0]]


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_expected_errors_shrink_and_outputs_keep_their_number(pattern: Any) -> None:
    torch.manual_seed(1)
    x = data(60, 16) + torch.randn(16, dtype=torch.float64) * 4
    settings: dict[str, Any] = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    found = []
    for method in (spartan.Wanda(**settings), spartan.DSnoT(spartan.Wanda(**settings))):
        module = linear(16, 12)
        dense = module.weight.detach().clone()
        spartan.prune(module, method, [x], include="weight")
        kept = module.weight.detach() != 0
        assert torch.equal(module.weight.detach()[kept], dense[kept])
        assert torch.equal(kept.sum(1), torch.full((12,), 8))
        if pattern:
            assert bool((kept.unflatten(1, (-1, 4)).sum(2) == 2).all())
        found.append(((dense - module.weight.detach()) @ x.mean(0)).abs())
    assert bool((found[1] <= found[0] + 1e-12).all()) and float(found[1].sum()) < 0.8 * float(found[0].sum())


# --- bad input -------------------------------------------------------------------------------------------------------


def test_wrong_settings_of_second_stages_are_named() -> None:
    wanda, mask = spartan.Wanda(sparsity=0.5), torch.ones(24, 16, dtype=torch.bool)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: spartan.ADMM(0.5), TypeError, "first must be a score such as"),  # type: ignore[arg-type]
        (lambda: spartan.ADMM({}), ValueError, "at least one weight"),
        (lambda: spartan.ADMM({"0.weight": mask.float()}), TypeError, "bool tensors; got torch.float32 for '0.weight'"),
        (lambda: spartan.ADMM({"0.weight": mask}), ValueError, "reselect must be False with given masks"),
        (lambda: spartan.ADMM(wanda, iterations=0), ValueError, "iterations must be an int of at least 1; got 0"),
        (lambda: spartan.ADMM(wanda, damping=-0.1), ValueError, "damping"),
        (lambda: spartan.DSnoT(wanda, cycles=1.5), ValueError, "cycles must be an int"),  # type: ignore[arg-type]
    ]
    for make, kind, message in cases:
        with pytest.raises(kind, match=message):
            make()
    model, x = mlp(16, 24, 16), data(30, 16, dtype=torch.float32)
    dense = copy.deepcopy(model)
    blocks = spartan.Wanda(sparsity=0.5, block_size=(4, 1))
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (spartan.DSnoT(blocks), {}, r"block_size must be 1 with DSnoT, which swaps weights; '0.weight' has \(4, 1\)"),
        (spartan.DSnoT({"9.weight": mask}), {}, r"masks are given for \['9.weight'\]"),
        (spartan.DSnoT({"0.weight": mask.T}), {}, r"mask of '0.weight' must be \(24, 16\); got \(16, 24\)"),
        (spartan.DSnoT({"0.weight": mask}), {"costs": spartan.FLOPs(x)}, "groups and costs must be left out"),
    ]
    for method, arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            spartan.prune(model, method, [x], **arguments)
        assert untouched(model, dense)


def test_a_singular_hessian_does_no_harm_to_a_reconstruction() -> None:
    x = data(5, 16, dtype=torch.float32)
    x[:, 2] = 0
    for reselect in (True, False):
        model = mlp(16, 24)
        method = spartan.ADMM(spartan.Wanda(sparsity=0.5), reselect=reselect, damping=0.0)
        result = spartan.prune(model, method, [x], include="*.weight")
        assert bool(model[0].weight.isfinite().all()) and result.sparsity == 0.5
