"""Pruning of trained models: scores against direct solutions, exact budgets, the order of layers, interruption."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import spartan
from spartan.nn.selection import find_weights
from spartan.pruning.forwards import Forwards
from spartan.pruning.layers import Layer
from spartan.pruning.selection import Budget
from spartan.pruning.statistics import Statistics
from spartan.pruning.watches import watch_of

pytestmark = pytest.mark.usefixtures("one_thread")


def data(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Correlated inputs."""
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=made, dtype=torch.float64)
    return (torch.randn(rows, columns, generator=made, dtype=torch.float64) @ mix).to(dtype)


def linear(columns: int, rows: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=False, dtype=torch.float64)


def layer_of(module: nn.Module, block: tuple[int, int] = (1, 1), pattern: tuple[int, int] | None = None) -> Layer:
    return Layer(find_weights(module)[0], block, pattern)


def seen_of(x: torch.Tensor) -> Statistics:
    seen = Statistics(products=True)
    for part in x.split(7):
        seen.add(part[None])
    return seen


def refit(row: torch.Tensor, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The least squares of one row on the inputs that it keeps, from scratch."""
    out = torch.zeros_like(row)
    out[kept] = torch.linalg.lstsq(x[:, kept], x @ row).solution
    return out


def mlp(*widths: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


# --- scores and values, against direct solutions --------------------------------------------------------------------


def test_wanda_keeps_what_a_calculation_by_hand_keeps() -> None:
    module = linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -3.0, 2.0], [4.0, 1.0, -1.0]]))
    x = torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 2.0]], dtype=torch.float64)  # norms 5, 1, 2: scores 5 3 4; 20 1 2
    result = spartan.prune(module, spartan.Wanda(sparsity=1 / 3), [x], include="weight")
    assert module.weight.tolist() == [[1.0, 0.0, 2.0], [4.0, 0.0, -1.0]]
    dropped = float(((x @ torch.tensor([[0.0, -3.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64).T) ** 2).sum())
    whole = float(((x @ torch.tensor([[1.0, -3.0, 2.0], [4.0, 1.0, -1.0]], dtype=torch.float64).T) ** 2).sum())
    assert result.rows[0].error == result.rows[0].error_before == pytest.approx(dropped / whole, rel=1e-12)


def test_wanda_compares_within_outputs_or_within_the_layer() -> None:
    x = torch.eye(4, dtype=torch.float64)
    for by_output, expected in ((True, [[1, 1, 0, 0], [1, 1, 0, 0]]), (False, [[1, 1, 1, 1], [0, 0, 0, 0]])):
        module = linear(4, 2)
        with torch.no_grad():
            module.weight.copy_(torch.tensor([[9.0, 8.0, 7.0, 6.0], [4.0, 3.0, 2.0, 1.0]]))
        spartan.prune(module, spartan.Wanda(sparsity=0.5, by_output=by_output), [x], include="weight")
        assert (module.weight != 0).int().tolist() == expected


def test_what_outputs_cannot_share_evenly_goes_to_the_largest() -> None:
    module = linear(5, 4)
    spartan.prune(module, spartan.Wanda(sparsity=0.35), [data(9, 5)], include="weight")  # 13 of 20
    kept = (module.weight != 0).sum(1)
    assert int(kept.sum()) == 13 and int(kept.min()) == 3 and int(kept.max()) == 4


def test_outputs_with_zeros_leave_their_place_to_others() -> None:
    module = linear(10, 4)
    with torch.no_grad():
        module.weight[0, 1:] = 0
        module.weight[1, 4:] = 0
    spartan.prune(module, spartan.Wanda(sparsity=0.5), [data(9, 10)], include="weight")
    assert sorted((module.weight != 0).sum(1).tolist()) == [1, 4, 7, 8]
    spartan.prune(module, spartan.Wanda(sparsity=0.5), [data(9, 10)], include="weight")
    assert int((module.weight != 0).sum()) == 20
    spartan.prune(module, spartan.Wanda(sparsity=0.25), [data(9, 10)], include="weight")
    assert int((module.weight != 0).sum()) == 20  # there are no more


@pytest.mark.parametrize("dropped", range(6))
def test_obs_without_one_weight_is_the_least_squares_optimum(dropped: int) -> None:
    """The columns come in an order in which the dropped one is first, as the columns before it are settled."""
    x, module = data(40, 6), linear(6, 1)
    order = [dropped, *(i for i in range(6) if i != dropped)]
    x = x[:, order]
    row = module.weight[0].detach().clone()
    row[0] = 1e-6 * row[0].abs().max()  # the weight that costs least to drop
    with torch.no_grad():
        module.weight[0] = row
    spartan.prune(module, spartan.OBS(sparsity=1 / 6, damping=0.0), [x], include="weight")
    kept = module.weight[0] != 0
    assert not bool(kept[0]) and int(kept.sum()) == 5
    torch.testing.assert_close(module.weight[0].detach(), refit(row, x, kept), rtol=1e-9, atol=1e-12)


def test_obs_drops_what_costs_least_of_one_weight() -> None:
    """Of columns with no correlation every weight costs w_j^2 G_jj, and nothing else changes."""
    module = linear(5, 3)
    scales = torch.tensor([1.0, 5.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    before, x = module.weight.detach().clone(), torch.eye(5, dtype=torch.float64) * scales
    spartan.prune(module, spartan.OBS(sparsity=0.4, damping=0.0), [x], include="weight")
    keep = (before * scales).abs().flatten().argsort(descending=True)[:9]
    expected = torch.zeros(15, dtype=torch.float64)
    expected[keep] = before.flatten()[keep]
    torch.testing.assert_close(module.weight.detach().flatten(), expected, rtol=1e-12, atol=1e-14)


def direct_sweep(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Columns settled from left to right; after each the rest is the least squares given the settled ones."""
    target, now = weight.clone(), weight.clone()
    n = weight.shape[1]
    for j in range(n):
        now[:, j] = torch.where(mask[:, j], now[:, j], 0.0)
        rest = slice(j + 1, n)
        error = (target - now)[:, : j + 1]  # minimise over the rest: G_rr d_r = -G_rs d_s
        if j + 1 < n:
            now[:, rest] = target[:, rest] + torch.linalg.solve(gram[rest, rest], gram[rest, : j + 1] @ error.T).T
    return now


@pytest.mark.parametrize(("block", "pattern"), [((1, 1), None), ((4, 1), None), ((2, 3), None), ((1, 1), (2, 4))])
@pytest.mark.parametrize("columns", [1, 5, 128])
def test_obs_is_a_sweep_of_direct_solutions(
    block: tuple[int, int], pattern: tuple[int, int] | None, columns: int
) -> None:
    x, module = data(60, 12), linear(12, 10)
    before = module.weight.detach().clone()
    settings: dict[str, Any] = {"pattern": pattern} if pattern else {"sparsity": 0.5, "block_size": block}
    spartan.prune(module, spartan.OBS(**settings, damping=0.01, columns=columns), [x], include="weight")
    gram = x.T @ x
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    mask = module.weight.detach() != 0
    torch.testing.assert_close(module.weight.detach(), direct_sweep(before, gram, mask), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block", [(1, 1), (1, 3), (2, 3)])
def test_obs_chooses_by_the_error_that_direct_solutions_have(block: tuple[int, int]) -> None:
    """The first choice, over all columns: the error that each block adds with the columns before it settled."""
    x, module = data(50, 6), linear(6, 4)
    weight, gram = module.weight.detach().clone(), x.T @ x
    rows, width = block
    costs = torch.zeros(4 // rows, 6 // width, dtype=torch.float64)
    for i, j in itertools.product(range(4 // rows), range(6 // width)):
        own, rest = slice(j * width, (j + 1) * width), slice((j + 1) * width, 6)
        reduced = gram[own, own] - gram[own, rest] @ torch.linalg.solve(gram[rest, rest], gram[rest, own])
        part = weight[i * rows : (i + 1) * rows, own]
        costs[i, j] = ((part @ reduced) * part).sum()
    spartan.prune(module, spartan.OBS(sparsity=0.5, damping=0.0, block_size=block), [x], include="weight")
    kept = (module.weight != 0)[::rows, ::width].flatten()
    assert set(kept.nonzero().flatten().tolist()) == set(
        costs.flatten().argsort(descending=True)[: len(kept) // 2].tolist()
    )


def test_obs_leaves_less_error_than_the_mask_alone() -> None:
    module, x = mlp(24, 32, 24), [data(64, 24, seed, torch.float32) for seed in (1, 2)]
    result = spartan.prune(module, spartan.OBS(sparsity=0.6), x, include="*.weight")
    assert all(row.error < 0.8 * row.error_before for row in result.rows)


@pytest.mark.parametrize("block", [(2, 4), (3, 5)])  # the second does not divide
def test_scores_of_blocks_are_sums(block: tuple[int, int]) -> None:
    module, x = linear(8, 6), data(20, 8)
    layer, seen = layer_of(module, block), seen_of(x)
    each = (module.weight.detach() * x.norm(dim=0)) ** 2
    for method, scores in ((spartan.Wanda(sparsity=0.5), each), (spartan.Magnitude(sparsity=0.5), module.weight.abs())):
        found = method.scores(layer, seen)
        assert found.shape == layer.grid
        for i, j in itertools.product(*map(range, found.shape)):
            part = scores[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            assert float(found[i, j]) == pytest.approx(float(part.detach().sum()), rel=1e-6)


def test_global_scores_of_obs_are_those_of_the_surgeon() -> None:
    module, x = linear(5, 3), data(30, 5)
    found = spartan.OBS(sparsity=0.5, damping=0.0).scores(layer_of(module), seen_of(x))
    for i, j in itertools.product(range(3), range(5)):
        kept = torch.arange(5) != j
        row = module.weight[i].detach()
        error = float(((x @ (row - refit(row, x, kept))) ** 2).sum())
        assert float(found[i, j]) == pytest.approx(error, rel=1e-8)


# --- statistics: convolutions, groups, attention ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), padding="same", padding_mode="circular"),
        nn.Conv2d(4, 6, 3, groups=2, padding=(1, 0), padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv1d(4, 6, 3, padding=2),
        nn.Conv3d(4, 2, 2, stride=(1, 2, 1)),
        nn.Linear(4, 5),
    ],
    ids=str,
)
def test_the_matrices_times_the_inputs_are_the_outputs(module: nn.Module) -> None:
    torch.manual_seed(0)
    dims = module.weight.dim() - 2  # type: ignore[operator, union-attr]
    module = module.double()
    x = torch.randn(3, 4, *[7] * dims, dtype=torch.float64)
    layer = layer_of(module)
    watch = watch_of(layer.candidate.uses[0])
    assert watch is not None
    seen = list(watch.rows(watch.read((x,), {})))
    outputs = torch.cat([rows @ layer.matrices(layer.values()).mT for rows in seen], 1)  # [groups, positions, out]
    found = outputs.movedim(0, -2).flatten(-2)
    bias = module.bias  # type: ignore[union-attr]
    expected = module(x)
    expected = expected.movedim(1, -1) if dims else expected
    torch.testing.assert_close(found.reshape(expected.shape) + bias, expected)


def test_errors_are_those_of_the_outputs_of_a_convolution() -> None:
    torch.manual_seed(0)
    module, x = nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False).double(), torch.randn(4, 6, 9, 9).double()
    with torch.no_grad():
        before = module(x)
    for method in (spartan.Wanda(sparsity=0.5), spartan.OBS(sparsity=0.5, block_size=(2, 3))):
        own = copy.deepcopy(module)
        (row,) = spartan.prune(own, method, [x], include="weight").rows
        error = float(((own(x).detach() - before) ** 2).sum() / (before**2).sum())
        assert row.error == pytest.approx(error, rel=1e-6)
        assert row.sparsity == 0.5


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.attention(x, x, value=x, need_weights=False)[0])


def test_attention_is_calibrated_in_and_out() -> None:
    torch.manual_seed(0)
    model = Attending().double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    dense = copy.deepcopy(model)
    result = spartan.prune(model, spartan.OBS(sparsity=0.5), [x], include="attention*weight")
    assert [row.name for row in result.rows] == ["attention.in_proj_weight", "attention.out_proj.weight"]
    with torch.no_grad():
        first = (x @ dense.attention.in_proj_weight.T - x @ model.attention.in_proj_weight.T).square().sum()
        assert result.rows[0].error == pytest.approx(
            float(first / (x @ dense.attention.in_proj_weight.T).square().sum()), rel=1e-6
        )
        half = copy.deepcopy(dense)
        half.attention.in_proj_weight.copy_(model.attention.in_proj_weight)
        before = half.attention(x, x, x)[0] - half.attention.out_proj.bias
        after = model.attention(x, x, x)[0] - model.attention.out_proj.bias
        assert result.rows[1].error == pytest.approx(
            float((before - after).square().sum() / before.square().sum()), rel=1e-6
        )
    assert not model.attention._forward_pre_hooks


def test_an_attention_over_other_keys_is_named() -> None:
    class Crossing(Attending):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.attention(x, x + 1, x)[0])

    with pytest.raises(ValueError, match="query, key and value"):
        spartan.prune(Crossing(), spartan.Wanda(sparsity=0.5), [torch.randn(2, 3, 8)], include="*weight")


# --- budgets ---------------------------------------------------------------------------------------------------------

METHODS = [spartan.Magnitude, spartan.Wanda, spartan.OBS]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global", {"0.weight": 0.25}])
def test_budgets_are_exact(kind: Any, distribution: Any) -> None:
    model = mlp(20, 33, 17, 9)
    result = spartan.prune(
        model, kind(sparsity=0.61, distribution=distribution), [data(40, 20, dtype=torch.float32)], include="*.weight"
    )
    weights = [module.weight for module in model if isinstance(module, nn.Linear)]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert zeros == round(0.61 * total)
    assert result.sparsity == zeros / total
    if distribution == "uniform":
        assert all(
            row.sparsity == pytest.approx(0.61, abs=1.5 / min(w.numel() for w in weights)) for row in result.rows
        )
    if isinstance(distribution, dict):
        assert result.rows[0].sparsity == 0.25


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("block", [(4, 1), (3, 5), (2, 8)])
def test_budgets_of_blocks_are_exact_to_a_block(kind: Any, block: tuple[int, int]) -> None:
    model = mlp(20, 33, 17, 9)
    spartan.prune(model, kind(sparsity=0.61, block_size=block), [data(40, 20, dtype=torch.float32)], include="*.weight")
    weights = [module.weight for module in model if isinstance(module, nn.Linear)]
    kept, total = sum(int((w != 0).sum()) for w in weights), sum(w.numel() for w in weights)
    budget = total - round(0.61 * total)
    assert budget - block[0] * block[1] < kept <= budget
    for weight in weights:
        for rows in weight.detach().split(block[0]):
            for part in rows.split(block[1], 1):
                assert bool((part == 0).all()) or bool((part != 0).all())


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 3)])
def test_each_m_keep_n(kind: Any, pattern: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(12, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 4, 5))
    torch.manual_seed(0)
    spartan.prune(model, kind(pattern=pattern), [torch.randn(30, 12, 4, 4)], include="*.weight")
    for module in (model[0], model[3]):
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        assert torch.equal(
            (weight != 0).unflatten(1, (-1, pattern[1])).sum(2),
            torch.full_like(weight.unflatten(1, (-1, pattern[1])).sum(2), pattern[0], dtype=torch.int64),
        )


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_what_is_kept_costs_no_more_than_the_budget(kind: Any, distribution: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.Flatten(), nn.Linear(12 * 16, 10))
    x = torch.randn(12, 3, 8, 8)
    dense = {n: int(p.numel()) for n, p in model.named_parameters() if p.dim() > 1}
    spartan.prune(
        model,
        kind(sparsity=0.7, distribution=distribution, block_size=(4, 1)),
        [x],
        include="*.weight",
        costs=spartan.FLOPs(x),
    )
    flops = {"0.weight": 36.0, "2.weight": 16.0, "4.weight": 1.0}  # output positions
    kept = sum(int(model.get_parameter(n).count_nonzero()) * flops[n] for n in dense)
    total = sum(count * flops[n] for n, count in dense.items())
    dearest = 4 * 36.0
    assert 0.3 * total - 3 * dearest < kept <= 0.3 * total * (1 + 1e-6)


def test_global_budgets_compare_relative_errors() -> None:
    """Scaling a layer's outputs changes nothing, as the next layer's inputs do not change its share of them."""
    x = data(60, 16, dtype=torch.float32)
    shares = []
    for factor in (1.0, 100.0):
        model = mlp(16, 24, 16)
        with torch.no_grad():
            model[0].weight.mul_(factor)  # type: ignore[operator]
            model[0].bias.mul_(factor)  # type: ignore[operator]
        result = spartan.prune(model, spartan.Wanda(sparsity=0.5, distribution="global"), [x], include="*.weight")
        shares.append([row.sparsity for row in result.rows])
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert shares[0][0] != shares[0][1]


def test_global_budgets_are_those_of_a_direct_calculation() -> None:
    x, model = data(60, 16), mlp(16, 24, 10, dtype=torch.float64)
    inputs = {"0": x, "2": torch.relu(model[0](x)).detach()}
    scores = {}
    for name, seen in inputs.items():
        weight = model.get_submodule(name).weight.detach()
        variance = (seen @ weight.T).var(0, unbiased=False) * len(seen)
        scores[name] = (weight * seen.norm(dim=0)) ** 2 / variance[:, None]
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[round(0.4 * 624) - 1]
    result = spartan.prune(model, spartan.Wanda(sparsity=0.6, distribution="global"), [x], include="*.weight")
    for row, (name, own) in zip(result.rows, scores.items(), strict=True):
        assert row.name == f"{name}.weight"
        assert row.sparsity == pytest.approx(float((own < threshold).double().mean()), abs=1e-12)


def test_an_output_that_never_varies_has_a_spread() -> None:
    x, module = data(30, 6), linear(6, 3)
    with torch.no_grad():
        module.weight[1] = 0
    layer = layer_of(module)
    found = seen_of(x).spread(layer.matrices(layer.values()))[0]
    expected = (x @ module.weight.detach().T).var(0, unbiased=False) * 30
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-9, atol=0)
    assert 0 < float(found[1]) < 1e-5 * float(found.max())


def test_groups_have_settings_of_their_own() -> None:
    model = mlp(16, 24, 16, 8)
    groups = [
        spartan.Group(include="2.weight", pattern=(2, 4)),
        spartan.Group(include="4.weight", sparsity=0.25, block_size=4),
    ]
    result = spartan.prune(
        model, spartan.OBS(sparsity=0.5), [data(60, 16, dtype=torch.float32)], include="0.weight", groups=groups
    )
    assert [row.sparsity for row in result.rows] == [0.5, 0.5, 0.25]
    assert [row.pattern for row in result.rows] == [None, (2, 4), None]
    assert result.rows[2].block_size == (4, 4)


def test_sparsity_can_be_that_of_the_model() -> None:
    model = mlp(16, 24, 16)
    spartan.prune(
        model, spartan.Wanda(sparsity=0.5), [data(9, 16, dtype=torch.float32)], include="*.weight", count="model"
    )
    total = sum(p.numel() for p in model.parameters())
    assert sum(int((p == 0).sum()) for p in model.parameters()) == round(0.5 * total)


# --- the pass over layers --------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Layers that are not called in the order of their definition; two share an input, one is written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(12, 4)
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 12)
        self.first = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(x)
        y += x
        return self.last(torch.relu_(y) + self.third(x))


def test_layers_are_pruned_in_the_order_of_calls() -> None:
    torch.manual_seed(0)
    model = Branches()
    result = spartan.prune(model, spartan.Wanda(sparsity=0.5), [torch.randn(30, 8)], include="*.weight")
    assert [row.name for row in result.rows] == ["first.weight", "second.weight", "third.weight", "last.weight"]


def by_hand(model: nn.Module, order: list[str], batches: list[Any], call: Any, keep: float) -> None:
    """Wanda by forward passes of the whole model alone: each layer sees what the pruned ones before it give."""
    for name in order:
        module = model.get_submodule(name)
        seen: list[torch.Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            for batch in batches:
                call(model, batch)
        hook.remove()
        weight: torch.Tensor = module.weight.data  # type: ignore[assignment, union-attr]
        scores = weight.abs() * torch.cat(seen).norm(dim=0)
        threshold = scores.flatten().sort(descending=True).values[round(keep * scores.numel()) - 1]
        weight.mul_(scores >= threshold)


@pytest.mark.parametrize("deep", [False, True])
def test_later_layers_see_pruned_earlier_ones(deep: bool) -> None:
    """As repeated runs of the whole model do; the deep one has blocks whose outputs are kept and replayed."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Branches2(8) for _ in range(6)]) if deep else mlp(8, 16, 16, 8)
    model = model.double()
    batches = [torch.randn(16, 8, dtype=torch.float64) for _ in range(3)]
    expected = copy.deepcopy(model)
    result = spartan.prune(model, spartan.Wanda(sparsity=0.5, by_output=False), batches, include="*.weight")
    by_hand(expected, [row.name.removesuffix(".weight") for row in result.rows], batches, lambda m, x: m(x), 0.5)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected.get_parameter(name)), name
    assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in model.modules())


class Branches2(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, 16), nn.Linear(width, 16), nn.Linear(16, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        out = self.down(torch.relu(self.up(h)) * self.gate(h))
        out += x  # writes into what a module returned
        return out


def test_blocks_that_are_done_are_not_run_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Branches2(8) for _ in range(6)])
    runs = [0] * 6
    for index, block in enumerate(model):

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        block.norm.register_forward_hook(count)
    batches = [torch.randn(16, 8) for _ in range(3)]
    spartan.prune(model, spartan.Wanda(sparsity=0.5), batches, include="*.weight")
    # by batch: once to find the order; at its own two stops; once for what comes after it
    assert runs == [3 * 4] * 5 + [3 * 3]


class Reading(nn.Module):
    """Blocks of which each reads the one before; the head reads all, or the last, by `reads`."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.blocks, self.reads = nn.ModuleList([Branches2(8) for _ in range(6)]), reads
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
            if self.reads == "second" and len(outputs) == 6:
                outputs[-1] = outputs[-1] + outputs[2]
        return self.head(torch.stack(outputs).sum(0) if self.reads == "all" else outputs[-1])


@pytest.mark.parametrize(("reads", "most"), [("last", 1), ("second", 3), ("all", 6)])
def test_outputs_are_kept_as_long_as_something_reads_them(reads: str, most: int) -> None:
    torch.manual_seed(0)
    model = Reading(reads).double()
    batches = [torch.randn(16, 8, dtype=torch.float64) for _ in range(3)]
    layers = [Layer(candidate, (1, 1)) for candidate in find_weights(model) if candidate.weight.dim() == 2]
    with Forwards(model, batches, layers, lambda model, x: model(x)) as forwards:
        held = []
        for stop in forwards.stops:
            for _ in forwards.inputs(stop):
                pass
            held.append(forwards.outputs.held() // (3 * 16 * 8 * 8))
            forwards.finish(stop)
        assert max(held) == most
    expected = copy.deepcopy(model)
    wanda = spartan.Wanda(sparsity=0.5, by_output=False)
    names = [row.name.removesuffix(".weight") for row in spartan.prune(model, wanda, batches, include="*.weight").rows]
    by_hand(expected, names, batches, lambda m, x: m(x), 0.5)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected.get_parameter(name)), name


def test_a_layer_that_is_called_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))

    torch.manual_seed(0)
    model = Twice().double()
    x = torch.randn(20, 8, dtype=torch.float64)
    with torch.no_grad():
        both = torch.cat([x, torch.tanh(model.layer(x))])
        scores = model.layer.weight.abs() * both.norm(dim=0)
    expected = scores > scores.flatten().sort().values[31]
    spartan.prune(model, spartan.Wanda(sparsity=0.5, by_output=False), [x], include="*.weight")
    assert torch.equal(model.layer.weight != 0, expected)


def test_tied_weights_see_the_inputs_of_all_their_uses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[2].weight = model[0].weight
    x = torch.randn(20, 8, dtype=torch.float64)
    with torch.no_grad():
        both = torch.cat([x, torch.tanh(model[0](x))])
        scores = model[0].weight.abs() * both.norm(dim=0)  # type: ignore[operator, union-attr]
    expected = scores > scores.flatten().sort().values[31]
    result = spartan.prune(model, spartan.Wanda(sparsity=0.5, by_output=False), [x], include="*.weight")
    assert model[2].weight is model[0].weight
    assert torch.equal(model[0].weight != 0, expected)
    assert [row.name for row in result.rows] == ["0.weight", "4.weight"]


def test_halves_are_pruned_as_their_values_in_float32_are() -> None:
    x = [data(40, 16, seed, torch.bfloat16) for seed in range(2)]
    for method in (spartan.Wanda(sparsity=0.5), spartan.OBS(sparsity=0.5)):
        half = mlp(16, 24, dtype=torch.bfloat16)
        full = copy.deepcopy(half).float()
        spartan.prune(half, method, x, include="*.weight")
        spartan.prune(full, method, [batch.float() for batch in x], include="*.weight")
        assert half[0].weight.dtype == torch.bfloat16
        assert torch.equal(half[0].weight, full[0].weight.bfloat16())  # type: ignore[operator, union-attr]


def test_statistics_of_halves_are_in_float32() -> None:
    seen = Statistics(products=True)
    seen.add(torch.full((1, 4096, 2), 1.0, dtype=torch.bfloat16))
    seen.add(torch.full((1, 1, 2), 1.0, dtype=torch.bfloat16))
    assert seen.products is not None and seen.products.dtype == torch.float32
    assert float(seen.products[0, 0, 1]) == 4097.0


def test_a_compiled_model_is_pruned_as_the_plain_one() -> None:
    x = data(30, 16, dtype=torch.float32)
    plain, model = mlp(16, 24, 16), mlp(16, 24, 16)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    for one in (plain, compiled):
        result = spartan.prune(one, spartan.OBS(sparsity=0.5), [x], include="*.weight")
        assert [row.name for row in result.rows] == ["0.weight", "2.weight"]
    assert torch.equal(plain[2].weight, model[2].weight)
    torch.testing.assert_close(compiled(x), plain(x))


def test_training_mode_batch_statistics_and_random_state_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 16, 4))
    model.train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    spartan.prune(model, spartan.OBS(sparsity=0.5), [torch.ones(2, 3, 6, 6)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name == "0.weight"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def bert(layers: int = 3) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    return transformers.BertModel(config).eval()  # type: ignore[no-any-return]


def test_a_transformer_of_hugging_face_needs_nothing_special() -> None:
    model = bert()
    tokens = [torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    batches = [{"input_ids": t, "attention_mask": (t > 5).long()} for t in tokens]
    expected = copy.deepcopy(model)
    result = spartan.prune(model, spartan.Wanda(sparsity=0.5, by_output=False), batches, include="encoder.*.weight")
    names = [row.name for row in result.rows]
    assert len(names) == 18 and names[3] == "encoder.layer.0.attention.output.dense.weight"
    by_hand(expected, [n.removesuffix(".weight") for n in names], batches, lambda m, b: m(**b), 0.5)
    for name, weight in model.named_parameters():
        assert torch.equal(weight != 0, expected.get_parameter(name) != 0), name


def test_a_pruned_model_is_trained_on_with_its_zeros() -> None:
    model = mlp(16, 24, 16)
    spartan.prune(
        model,
        spartan.Wanda(sparsity=0.5, distribution="global"),
        [data(30, 16, dtype=torch.float32)],
        include="*.weight",
    )
    before = {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}
    sparsifier = spartan.Sparsifier(
        model, spartan.OneShot(sparsity=0.5, prune_at=0), 3, include="*.weight", count="masked", keep_zeros=True
    )
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier.attach(optimizer)
    for step in range(3):
        model(data(8, 16, step, torch.float32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsifier.finalize()
    for name, zeros in before.items():
        assert torch.equal(model.get_parameter(name) == 0, zeros)


def test_a_pruned_model_is_packed() -> None:
    model, x = mlp(32, 64, 32), data(30, 32, dtype=torch.float32)
    spartan.prune(model, spartan.OBS(sparsity=0.8, block_size=8), [x], include="*.weight")
    expected = model(x)
    packed = spartan.to_block_sparse(model, block_size=8)
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)


# --- interruption, progress, reports ---------------------------------------------------------------------------------


class Broken:
    """Batches; the model stops at the nth call of a layer."""

    def __init__(self, error: BaseException, calls: int) -> None:
        self.error, self.left = error, calls

    def __call__(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return model(batch)  # type: ignore[no-any-return]


def test_an_interruption_leaves_a_valid_model_and_says_where() -> None:
    model, x = mlp(16, 24, 16, 8), data(30, 16, dtype=torch.float32)
    dense = copy.deepcopy(model)
    with pytest.raises(spartan.PruningInterrupted, match=r"stopped at '2.weight': 1 of 3 weights are pruned") as caught:
        # one run to find the order, one for the first layer
        spartan.prune(model, spartan.OBS(sparsity=0.5), [x], include="*.weight", call=Broken(KeyboardInterrupt(), 2))
    assert isinstance(caught.value, KeyboardInterrupt)
    result = caught.value.result
    assert [row.name for row in result.rows] == ["0.weight"] and result.left == ("2.weight", "4.weight")
    assert "not reached, dense: 2.weight, 4.weight" in str(result)
    assert int((model[0].weight == 0).sum()) == model[0].weight.numel() // 2  # type: ignore[arg-type, union-attr, operator]
    for index in (2, 4):
        assert torch.equal(model[index].weight, dense[index].weight)  # type: ignore[arg-type]
    assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in model.modules())
    again = spartan.prune(model, spartan.OBS(sparsity=0.5), [x], include="*.weight")
    assert again.sparsity == 0.5


def test_an_interruption_within_a_layer_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def interrupted(*_: Any) -> float:
        measured.append(0)
        if len(measured) == 4:  # after the new values of the second layer are found
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr("spartan.pruning.steps._error", interrupted)
    model, x = mlp(16, 24, 16, 8), data(30, 16, dtype=torch.float32)
    dense = copy.deepcopy(model)
    with pytest.raises(spartan.PruningInterrupted, match=r"stopped at '2.weight': 1 of 3"):
        spartan.prune(model, spartan.OBS(sparsity=0.5), [x], include="*.weight")
    assert torch.equal(model[2].weight, dense[2].weight) and not torch.equal(model[0].weight, dense[0].weight)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("kind", ["Wanda", "OBS", "DSnoT", "ADMM"])
def test_an_expert_that_gets_no_tokens_is_pruned_all_the_same(kind: str, distribution: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.used(x), self.idle(x[:0])])

    method: Any = spartan.Wanda(sparsity=0.5, distribution=distribution)
    if kind == "OBS":
        method = spartan.OBS(sparsity=0.5, distribution=distribution)
    elif kind != "Wanda":
        method = getattr(spartan, kind)(method)
    model = Experts()
    dense = copy.deepcopy(model)
    result = spartan.prune(model, method, [torch.randn(20, 8)], include="*.weight")
    assert result.sparsity == 0.5
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    idle = result.rows[1]
    assert idle.name == "idle.weight" and idle.error is None and "inputs were all zero, or none" in idle.note
    if kind == "Wanda" and distribution == "uniform":
        kept, rows = model.idle.weight.detach(), dense.idle.weight.detach().abs()
        assert torch.equal(kept != 0, rows >= rows.sort(1, descending=True).values[:, 3:4])


def test_an_error_of_the_model_leaves_a_valid_model_and_says_where() -> None:
    model, x = mlp(16, 24, 16, 8), data(30, 16, dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"stopped at '4.weight': 2 of 3"), pytest.raises(RuntimeError, match="odd"):
        spartan.prune(model, spartan.Wanda(sparsity=0.5), [x], include="*.weight", call=Broken(RuntimeError("odd"), 3))
    assert int((model[4].weight == 0).sum()) == 0  # type: ignore[arg-type, union-attr, operator]


def test_progress_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = mlp(16, 24, 16), data(30, 16, dtype=torch.float32)
    spartan.prune(model, spartan.Wanda(sparsity=0.5), [x], include="*.weight", progress=True)
    assert "step 2 of 2: 2.weight" in capsys.readouterr().out
    spartan.prune(model, spartan.Wanda(sparsity=0.6), [x], include="*.weight")
    assert capsys.readouterr().out == ""


def test_the_result_prints_a_table_by_layer() -> None:
    model, x = mlp(16, 24, 16), data(30, 16, dtype=torch.float32)
    result = spartan.prune(model, spartan.OBS(sparsity=0.5, block_size=(4, 1)), [x])
    shown = str(result)
    assert shown.startswith("OBS: 50.00% zeros in 1 weights")
    (line,) = (line for line in shown.splitlines() if "0.weight" in line)
    row = result.rows[0]
    assert line.split()[:4] == ["0.weight", "24x16", "4x1", "50.00%"]
    assert line.split()[4:] == [f"{row.error_before:.2%}", f"{row.error:.2%}", f"{row.seconds:.2f}"]
    assert "not pruned (head: the last Linear): 2.weight" in shown
    assert result.skipped["0.bias"] == "bias"


def test_without_errors_only_squares_are_summed() -> None:
    model, x = mlp(16, 24, 16), data(30, 16, dtype=torch.float32)
    same = copy.deepcopy(model)
    result = spartan.prune(model, spartan.Wanda(sparsity=0.5), [x], include="*.weight", errors=False)
    spartan.prune(same, spartan.Wanda(sparsity=0.5), [x], include="*.weight")
    assert result.rows[0].error is None
    assert torch.equal(model[0].weight != 0, same[0].weight != 0)


def test_magnitude_needs_no_batches() -> None:
    model = mlp(16, 24, 16)
    same = copy.deepcopy(model)
    result = spartan.prune(model, spartan.Magnitude(sparsity=0.5, distribution="global"), include="*.weight")
    assert result.rows[0].error is None
    spartan.Sparsifier(
        same, spartan.OneShot(sparsity=0.5, prune_at=0), 1, include="*.weight", count="masked"
    ).finalize()
    assert torch.equal(model[0].weight, same[0].weight)


@pytest.mark.parametrize(
    "module", [nn.ConvTranspose2d(6, 8, 3), nn.Embedding(12, 8), nn.Bilinear(4, 6, 8)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("block", [1, (2, 3)])
def test_magnitude_prunes_every_kind_of_weight(module: nn.Module, block: Any) -> None:
    model = nn.Sequential(copy.deepcopy(module))
    same = copy.deepcopy(model)
    spartan.prune(model, spartan.Magnitude(sparsity=0.5, block_size=block), include="0.weight")
    method = spartan.OneShot(sparsity=0.5, prune_at=0, block_size=block)
    spartan.Sparsifier(same, method, 1, include="0.weight", count="masked").finalize()
    assert torch.equal(model[0].weight, same[0].weight)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_singular_hessian_is_damped_and_said() -> None:
    model = mlp(16, 24)
    result = spartan.prune(
        model, spartan.OBS(sparsity=0.5, damping=0.0), [data(5, 16, dtype=torch.float32)], include="*.weight"
    )
    assert "its Hessian is singular, as 5 inputs have fewer dimensions than 16; damped by" in result.rows[0].note
    assert result.rows[0].note in str(result)
    assert bool(model[0].weight.isfinite().all()) and result.sparsity == 0.5  # type: ignore[operator, union-attr]
    dead = data(40, 16, dtype=torch.float32)
    dead[:, 3] = 0
    model = mlp(16, 24)
    result = spartan.prune(model, spartan.OBS(sparsity=0.5), [dead], include="*.weight")
    assert "1 of its 16 inputs are always zero; damped by 0.01" in result.rows[0].note
    assert not bool(model[0].weight[:, 3].any())  # type: ignore[index]


def test_inputs_that_are_all_zero_do_no_harm() -> None:
    model = mlp(16, 24)
    result = spartan.prune(model, spartan.OBS(sparsity=0.5), [torch.zeros(3, 16)], include="*.weight")
    assert bool(model[0].weight.isfinite().all()) and result.sparsity == 0.5  # type: ignore[operator, union-attr]


def untouched(model: nn.Module, dense: nn.Module) -> bool:
    return all(torch.equal(p, dense.get_parameter(n)) for n, p in model.named_parameters())


def test_batches_that_are_no_use_are_refused_and_nothing_changes() -> None:
    model, x = mlp(16, 24, 16), data(30, 16, dtype=torch.float32)
    dense = copy.deepcopy(model)
    bad = x.clone()
    bad[2, 3] = float("nan")
    cases: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "at least one batch"),
        (iter(()), ValueError, "an iterator that was used before"),
        (None, ValueError, "batches must be given: Wanda scores weights by their inputs"),
        ({"x": x}, TypeError, "batches must be an iterable of batches"),
        (3, TypeError, "got int"),
        ([x, bad], ValueError, r"batches\[1\] makes some of '0.weight' NaN or infinite"),
        ([(x, x)], TypeError, "does not take 2 arguments"),
    ]
    for batches, kind, message in cases:
        with pytest.raises(kind, match=message):
            spartan.prune(model, spartan.Wanda(sparsity=0.5), batches, include="*.weight")
        assert untouched(model, dense)


def test_an_iterator_that_fails_leaves_the_model_untouched() -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield data(30, 16, dtype=torch.float32)
        raise OSError("the disk is gone")

    model = mlp(16, 24, 16)
    dense = copy.deepcopy(model)
    with pytest.raises(OSError, match="disk"):
        spartan.prune(model, spartan.Wanda(sparsity=0.5), failing(), include="*.weight")
    assert untouched(model, dense)


def test_an_iterator_is_gone_through_once() -> None:
    model = mlp(16, 24, 16)
    batches = (data(30, 16, seed, torch.float32) for seed in range(2))
    assert spartan.prune(model, spartan.OBS(sparsity=0.5), batches, include="*.weight").sparsity == 0.5


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.used(x))


def test_a_weight_that_is_never_called_is_refused_or_skipped() -> None:
    model, x = Idle(), torch.randn(9, 8)
    dense = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"'idle.weight': 'no batch reaches it'"):
        spartan.prune(model, spartan.Wanda(sparsity=0.5), [x], include="*.weight")
    assert untouched(model, dense)
    result = spartan.prune(model, spartan.Wanda(sparsity=0.5), [x], include="*.weight", uncalled="skip")
    assert [row.name for row in result.rows] == ["used.weight"] and result.skipped[
        "idle.weight"
    ] == "no batch reaches it"
    assert result.sparsity == 0.5 and torch.equal(model.idle.weight, dense.idle.weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no weight is left to prune"):
        spartan.prune(model, spartan.Wanda(sparsity=0.5), [x], include="idle.weight", uncalled="skip")
    assert spartan.prune(model, spartan.Magnitude(sparsity=0.5), [x], include="*.weight").sparsity == 0.5


def test_wrong_arguments_are_named() -> None:
    model, x = mlp(16, 24, 16), data(30, 16, dtype=torch.float32)
    dense = copy.deepcopy(model)
    wanda = spartan.Wanda(sparsity=0.5)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (spartan.GMP(sparsity=0.5), {}, TypeError, "method must be one such as spartan.Wanda"),
        (wanda, {"count": "all"}, ValueError, "count must be one of masked, model; got 'all'"),
        (wanda, {"uncalled": "no"}, ValueError, "uncalled must be one of refuse, skip"),
        (wanda, {"include": "none.*"}, ValueError, "matches no weight"),
        (spartan.Wanda(sparsity=0.999), {"count": "model"}, ValueError, "cannot be reached"),
        (spartan.Wanda(pattern=(2, 4)), {"costs": spartan.FLOPs(x)}, ValueError, "costs are not for weights with a"),
        (spartan.Wanda(pattern=(2, 5)), {}, ValueError, "does not divide into groups of 5"),
    ]
    for method, arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            spartan.prune(model, method, [x], **{"include": "*.weight", **arguments})
        assert untouched(model, dense)
    with pytest.raises(TypeError, match="model must be a"):
        spartan.prune("model", wanda, [x])  # type: ignore[arg-type]
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")  # type: ignore[index]
    with pytest.raises(ValueError, match=r"weight '2.weight' must be finite; 1 of its entries"):
        spartan.prune(model, wanda, [x], include="*.weight")
    for settings, message in (
        ({"damping": -1.0}, "damping"),
        ({"columns": 0}, "columns"),
        ({"sparsity": 1.5}, "sparsity"),
    ):
        with pytest.raises(ValueError, match=message):
            spartan.OBS(**{"sparsity": 0.5, **settings})


def test_a_budget_lets_nothing_over_it() -> None:
    layer = layer_of(linear(7, 5), (2, 3))
    scores = torch.rand(layer.grid)
    for amount in (0.0, 5.9, 6.0, 17.0, 34.9, 35.0):
        budget = Budget(layer, amount)
        assert amount - 6 < budget.used(budget.best(scores)) <= amount
