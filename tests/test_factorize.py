"""A dictionary and sparse coefficients in the place of a trained linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spartan
from spartan.pruning.statistics import Statistics

pytestmark = pytest.mark.usefixtures("one_thread")


def correlated(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose features are not independent, as those of a layer are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) * 0.3 + torch.eye(width)
    return torch.randn(rows, width, generator=generator) @ mixed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 3))


def seen_of(x: torch.Tensor) -> Statistics:
    seen = Statistics(products=True)
    seen.add(x[None])
    return seen


def low_rank_error(weight: torch.Tensor, x: torch.Tensor, numbers: float) -> float:
    """Of the best product of two dense factors with so many numbers, for these inputs."""
    rank = int(numbers * weight.numel() / sum(weight.shape))
    values = torch.linalg.svdvals(x.double() @ weight.double().mT)
    return float(values[rank:].square().sum() / values.square().sum())


@pytest.mark.parametrize("shape", [(60, 48), (30, 80), (90, 20)])
@pytest.mark.parametrize("compression", [0.3, 0.6])
def test_the_error_is_that_of_the_outputs_and_below_that_of_two_dense_factors(
    shape: tuple[int, int], compression: float
) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(*shape) * torch.rand(1, shape[1]), correlated(400, shape[1])
    method = spartan.CoSpaDi(compression=compression, damping=1e-6)
    found = method.factor(weight, seen_of(x))
    atoms, nonzeros = method.sizes(*shape)
    assert found.dictionary.shape == (atoms, shape[1]) and found.coefficients.shape == (shape[0], atoms)
    assert int(found.coefficients.count_nonzero(1).max()) <= nonzeros
    assert atoms * shape[1] + nonzeros * shape[0] <= (1 - compression) * weight.numel() + 1e-6
    left = x.double() @ (weight.double() - found.coefficients @ found.dictionary).mT
    error = float(left.square().sum() / (x.double() @ weight.double().mT).square().sum())
    assert found.error == pytest.approx(error, rel=1e-3)
    assert error < low_rank_error(weight, x, 1 - compression)


def test_calibration_lowers_the_error_of_the_outputs() -> None:
    torch.manual_seed(2)
    weight, x = torch.randn(50, 40), correlated(500, 40, seed=3) * torch.logspace(-1, 1, 40)
    method = spartan.CoSpaDi(compression=0.5)

    def error(seen: Statistics) -> float:
        found = method.factor(weight, seen)
        left = x.double() @ (weight.double() - found.coefficients @ found.dictionary).mT
        return float(left.square().sum())

    blind = seen_of(torch.eye(40))
    assert error(seen_of(x)) < 0.5 * error(blind)


def test_a_model_computes_what_its_report_says(tmp_path: Path) -> None:
    model, x = network(), correlated(300, 24)
    hidden = model[0](x).detach()
    result = spartan.factorize(model, spartan.CoSpaDi(compression=0.4), [x[:150], x[150:]])
    assert [row.name for row in result.rows] == ["0", "2"] and result.model is model
    assert "4.weight" in result.skipped and "CoSpaDi" in str(result)
    assert all(isinstance(model[i], spartan.FactorizedLinear) for i in (0, 2)) and type(model[4]) is nn.Linear
    for row in result.rows:
        assert row.remains <= 0.6
    error = float((model[0](x) - hidden).square().sum() / (hidden - model[0].coefficients.bias).square().sum())
    assert error == pytest.approx(result.rows[0].error, rel=0.05)
    torch.testing.assert_close(model[0](x), x @ model[0].weight.mT + model[0].coefficients.bias, rtol=1e-4, atol=1e-5)

    y = model(x).detach()
    spartan.save_pretrained(model, tmp_path / "saved")
    again = spartan.to_factorized(network(), result.atoms)
    spartan.load_pretrained(again, tmp_path / "saved")
    torch.testing.assert_close(again(x), y)
    packed = spartan.to_block_sparse(model, block_size=1)
    torch.testing.assert_close(packed(x), y, rtol=1e-4, atol=1e-5)
    assert not isinstance(packed[0].coefficients, nn.Linear)


def test_later_layers_see_what_earlier_ones_became() -> None:
    """The second layer's error is measured on the outputs of the first as it is now."""
    model, x = network(), correlated(300, 24)
    second = model[2].weight.detach().clone()
    result = spartan.factorize(model, spartan.CoSpaDi(compression=0.5, damping=1e-6), [x])
    inputs = model[1](model[0](x)).detach()
    left = inputs @ (second - model[2].weight.detach()).mT
    assert float(left.square().sum() / (inputs @ second.mT).square().sum()) == pytest.approx(
        result.rows[1].error, rel=0.05
    )


def test_what_is_left_of_the_coefficients_trains() -> None:
    model, x = network(), correlated(128, 24)
    target = model(x).detach()
    spartan.factorize(model, spartan.CoSpaDi(compression=0.5), [x])
    zeros = [model[i].coefficients.weight == 0 for i in (0, 2)]
    before = float((model(x) - target).square().mean())
    include = ["0.coefficients.weight", "2.coefficients.weight"]
    sparsity = float(torch.cat([z.flatten() for z in zeros]).double().mean())
    method = spartan.OneShot(sparsity=sparsity, prune_at=0.0)
    sparsifier = spartan.Sparsifier(model, method, total_steps=30, include=include, count="masked", keep_zeros=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sparsifier.attach(optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    sparsifier.finalize()
    assert float((model(x) - target).square().mean()) < 0.7 * before
    assert all(bool((model[i].coefficients.weight[z] == 0).all()) for i, z in zip((0, 2), zeros, strict=True))


def test_half_precision_weights_stay_half_precision() -> None:
    model, x = network().bfloat16(), correlated(200, 24).bfloat16()
    spartan.factorize(model, spartan.CoSpaDi(compression=0.4), [x])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert bool(model(x).isfinite().all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compression": 0.0}, "compression"),
        ({"compression": 1.0}, "compression"),
        ({"compression": 0.5, "ratio": 0.5}, "ratio"),
        ({"compression": 0.5, "steps": 0}, "steps"),
        ({"compression": 0.5, "damping": -1.0}, "damping"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spartan.CoSpaDi(**settings)


def test_what_cannot_be_done_is_refused_and_leaves_the_model_as_it_was() -> None:
    model, x, method = network(), correlated(64, 24), spartan.CoSpaDi(compression=0.5)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="method must be one such as"):
        spartan.factorize(model, spartan.Wanda(sparsity=0.5), [x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one batch"):
        spartan.factorize(model, method, [])
    with pytest.raises(ValueError, match="no linear layer to replace"):
        spartan.factorize(nn.Sequential(nn.Conv2d(3, 4, 3)), method, [torch.randn(1, 3, 8, 8)])
    with pytest.raises(ValueError, match="does not"):
        spartan.factorize(model, spartan.CoSpaDi(compression=0.99), [x])
    with pytest.raises(ValueError, match="finite"):
        spartan.factorize(model, method, [x, torch.full_like(x, torch.nan)])
    with pytest.raises(ValueError, match=r"atoms has '1'"):
        spartan.to_factorized(network(), {"1": 3})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
