"""Pruning of transposed convolutions: statistics, scores and values against what the layer itself computes."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spartan
from spartan.nn.selection import find_weights
from spartan.pruning.layers import Layer
from spartan.pruning.watches import watch_of
from tests.test_pruning import direct_sweep, untouched

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = [
    lambda: nn.ConvTranspose1d(4, 6, 3, bias=False),
    lambda: nn.ConvTranspose1d(4, 6, 5, stride=3, padding=2, output_padding=1, dilation=2, groups=2, bias=False),
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
    lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 3), padding=(2, 0), dilation=(1, 2), groups=2, bias=False),
    lambda: nn.ConvTranspose2d(4, 8, 2, stride=4, output_padding=3, groups=4, bias=False),  # some outputs see nothing
    lambda: nn.ConvTranspose2d(4, 6, 1, padding=1, bias=False),  # cuts inputs off
    lambda: nn.ConvTranspose3d(4, 2, 2, stride=(1, 2, 1), bias=False),
]


def made(make: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    module = make().double()
    return module, torch.randn(3, 4, *[4] * (module.weight.dim() - 2), dtype=torch.float64)


def responses(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The outputs that each weight makes alone, if it is one: [*weight, ...], which shares no code with pruning."""
    weight = module.weight.detach()
    units = torch.eye(weight.numel(), dtype=weight.dtype).view(-1, *weight.shape)
    with torch.no_grad():
        made = [torch.func.functional_call(module, {"weight": unit}, (x,)) for unit in units]
    return torch.stack(made).view(*weight.shape, -1)


def matrix_of(module: Any, values: torch.Tensor) -> torch.Tensor:
    """[in, out / groups, *kernel] as [groups, out / groups, kernel * in / groups]."""
    grouped = values.unflatten(0, (module.groups, -1))  # [g, in / g, out / g, *kernel]
    return grouped.movedim(1, -1).reshape(module.groups, values.shape[1], -1)


def gram_of(module: Any, x: torch.Tensor) -> torch.Tensor:
    """sum x x^T of each group [groups, n, n]: products of the outputs that the weights of one output make."""
    alone = responses(module, x)[:, 0]  # of the first output of each group: [in, *kernel, outputs]
    grouped = alone.unflatten(0, (module.groups, -1)).movedim(1, -2)
    grouped = grouped.reshape(module.groups, -1, grouped.shape[-1])
    return grouped @ grouped.mT


@pytest.mark.parametrize("make", MODULES)
def test_the_matrices_times_the_inputs_are_the_outputs(make: Any) -> None:
    module, x = made(make)
    sizes: list[dict[str, Any]] = [{}]
    if max(module.stride) > 1:
        least = module(x).shape[2:]
        sizes.append({"output_size": [side - o for side, o in zip(least, module.output_padding, strict=True)]})
    layer = Layer(find_weights(module)[0], (1, 1))
    watch = watch_of(layer.candidate.uses[0])
    assert watch is not None
    for given, size in itertools.product((x, x[0]), sizes):
        seen = watch.read((), {**size, "input": given})
        assert torch.equal(seen, watch.read((given, *size.values()), {}))
        rows = torch.cat(list(watch.rows(seen)), 1)
        outputs = rows @ layer.matrices(layer.values()).mT  # [groups, positions, out / groups]
        expected = module(given, **size)
        expected = (expected if given is x else expected[None]).movedim(1, -1)
        torch.testing.assert_close(outputs.movedim(0, -2).reshape(expected.shape), expected)


def test_values_come_back_from_matrices_as_they_were() -> None:
    for make in MODULES:
        module, _ = made(make)
        layer = Layer(find_weights(module)[0], (1, 1))
        assert torch.equal(layer.from_matrices(layer.matrices(layer.values())), layer.values())
        assert torch.equal(layer.matrices(layer.values()), matrix_of(module, module.weight.detach()))


@pytest.mark.parametrize("make", MODULES[:5])
def test_wanda_keeps_the_weights_that_matter_most_alone(make: Any) -> None:
    """A score is the squared error of the outputs without the weight: each output keeps half of its weights."""
    module, x = made(make)
    errors = matrix_of(module, responses(module, x).square().sum(-1) * module.weight.detach().square())
    spartan.prune(module, spartan.Wanda(sparsity=0.5), [x], include="weight")
    half = errors.shape[-1] // 2
    expected = errors >= errors.sort(-1, descending=True).values[..., half - 1 : half]
    assert torch.equal(matrix_of(module, module.weight.detach() != 0), expected)


@pytest.mark.parametrize(("block", "pattern"), [((1, 1), None), ((2, 1), None), ((3, 2), None), ((1, 1), (1, 2))])
@pytest.mark.parametrize("make", MODULES[:4])
def test_obs_is_a_sweep_of_direct_solutions(make: Any, block: tuple[int, int], pattern: tuple[int, int] | None) -> None:
    module, x = made(make)
    before = matrix_of(module, module.weight.detach())
    settings: dict[str, Any] = {"pattern": pattern} if pattern else {"sparsity": 0.5, "block_size": block}
    dense = copy.deepcopy(module)
    (row,) = spartan.prune(module, spartan.OBS(**settings, damping=0.02, columns=4), [x], include="weight").rows
    gram = gram_of(dense, x)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    gram = gram + 0.02 * mean * torch.eye(gram.shape[-1], dtype=torch.float64)
    now = matrix_of(module, module.weight.detach())
    for group in range(module.groups):
        expected = direct_sweep(before[group], gram[group], now[group] != 0)
        torch.testing.assert_close(now[group], expected, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        error = (dense(x) - module(x)).square().sum() / dense(x).square().sum()
    assert row.error == pytest.approx(float(error), rel=1e-6)
    assert row.error < row.error_before  # type: ignore[operator]


@pytest.mark.parametrize("kind", [spartan.Magnitude, spartan.Wanda, spartan.OBS])
@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_are_of_outputs_and_inputs_and_budgets_exact(kind: Any, distribution: str, groups: int) -> None:
    """Of 5 outputs the last block of 2 is cut."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 5 * groups, 3, stride=2, groups=groups)
    )
    method = kind(sparsity=0.5, block_size=(2, 3), distribution=distribution)
    spartan.prune(model, method, [torch.randn(2, 3, 7, 7)], include="*.weight")
    zero = [module.weight == 0 for module in model if hasattr(module, "weight")]
    kept = sum(int((~z).sum()) for z in zero)
    total = sum(z.numel() for z in zero)
    assert total / 2 - 6 < kept <= total / 2
    for strip in zero[1].split(3, 0):
        for block in strip.split(2, 1):
            assert torch.equal(block.flatten(0, 1).all(0), block.flatten(0, 1).any(0))  # by kernel position


@pytest.mark.parametrize("groups", [1, 2])
def test_costs_of_blocks_differ_and_are_kept_to(groups: int) -> None:
    """Blocks at the edge of 5 outputs are smaller, and FLOPs count the pixels of the input of a transposed one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 5 * groups, 3, groups=groups))
    x = torch.randn(2, 3, 7, 7)
    method = spartan.OBS(sparsity=0.6, block_size=(2, 3), columns=9, distribution="global")
    spartan.prune(model, method, [x], include="*.weight", costs=spartan.FLOPs(x))
    pixels = {0: 25, 2: 25}
    kept = sum(int(model[i].weight.count_nonzero()) * n for i, n in pixels.items())  # type: ignore[operator, union-attr]
    total = sum(model[i].weight.numel() * n for i, n in pixels.items())  # type: ignore[operator, union-attr, misc]
    assert 0.4 * total - 2 * 6 * 25 < kept <= 0.4 * total * (1 + 1e-6)


@pytest.mark.parametrize("kind", [spartan.Magnitude, spartan.Wanda, spartan.OBS])
def test_each_m_inputs_keep_n(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.ConvTranspose1d(16, 6, 3, groups=2)
    spartan.prune(model, kind(pattern=(2, 4)), [torch.randn(4, 16, 9)], include="weight")
    assert bool(((model.weight != 0).unflatten(0, (-1, 4)).sum(1) == 2).all())


@pytest.mark.parametrize("method", ["DSnoT", "ADMM"])
def test_a_second_stage_goes_on(method: str) -> None:
    torch.manual_seed(0)
    model, x = nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2), torch.randn(4, 8, 5, 5)
    first = copy.deepcopy(model)
    alone = spartan.prune(first, spartan.Wanda(sparsity=0.6), [x], include="weight")
    result = spartan.prune(model, getattr(spartan, method)(spartan.Wanda(sparsity=0.6)), [x], include="weight")
    assert result.sparsity == alone.sparsity
    assert not torch.equal(model.weight, first.weight)
    if method == "ADMM":
        assert result.rows[0].error < alone.rows[0].error  # type: ignore[operator]


def test_blocks_across_groups_of_inputs_are_refused_and_magnitude_takes_them() -> None:
    torch.manual_seed(0)
    model, x = nn.ConvTranspose1d(8, 6, 3, groups=2), torch.randn(4, 8, 9)
    dense = copy.deepcopy(model)
    for method in (
        spartan.Wanda(sparsity=0.5, block_size=(1, 3)),
        spartan.OBS(sparsity=0.5, block_size=(1, 3)),
        spartan.OBS(pattern=(4, 8)),
        spartan.DSnoT(spartan.Magnitude(pattern=(4, 8))),
    ):
        with pytest.raises(ValueError, match="divides the 4 inputs of each group of 'weight', a transposed"):
            spartan.prune(model, method, [x], include="weight")
        assert untouched(model, dense)
    result = spartan.prune(model, spartan.Magnitude(sparsity=0.5, block_size=(1, 3)), [x], include="weight")
    assert 0.5 <= result.sparsity < 0.52 and result.rows[0].error is not None


def test_zeros_stay_in_training_and_in_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(6, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2))
    x = torch.randn(2, 6, 4, 4)
    spartan.prune(model, spartan.OBS(sparsity=0.75, block_size=(2, 2)), [x], include="*.weight")
    zeros = {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}
    method = spartan.OneShot(sparsity=0.75, block_size=(2, 2), prune_at=0)
    sparsifier = spartan.Sparsifier(model, method, 3, include="*.weight", count="masked", keep_zeros=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsifier.finalize()
    for name, zero in zeros.items():
        assert torch.equal(model.get_parameter(name) == 0, zero) and bool(zero.any())
    expected = model(x)
    spartan.save_pretrained(model, tmp_path / "saved")
    torch.manual_seed(1)
    other = nn.Sequential(nn.ConvTranspose2d(6, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2))
    spartan.load_pretrained(other, tmp_path / "saved")
    assert torch.equal(other(x), expected)
