"""Methods that mask the forward pass and train more than they keep: Top-KAST, dual averaging, DPF, IHT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods_common import Toy, step
from torch import nn
from torch.nn import functional

from spartan.methods import DPF, IHT, DualAveraging, Method, TopKAST
from spartan.sparsifier import Sparsifier

RATE = 0.1


pytestmark = pytest.mark.usefixtures("one_thread")


def toy(method: Method, weight: list[float], fused: bool = False) -> tuple[Toy, Sparsifier, torch.optim.Optimizer]:
    model = Toy(weight)
    sparsifier = Sparsifier(model, method, 10, include="row.weight", count="masked")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, fused=fused)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def kept(sparsifier: Sparsifier) -> list[bool]:
    return next(iter(sparsifier.masks().values())).hard.flatten().tolist()


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        # A = {4}, B = {4, -2}, D = 1/4: theta - 0.1 (G + 0.5 c p(theta)) with c = 1, 4; c p = 1, -4 or 4, -8
        ("l1", [3.85, -1.9, 1.0, 0.5]),
        ("l2", [3.7, -1.7, 1.0, 0.5]),
    ],
)
def test_top_kast_steps_by_hand(penalty: str, expected: list[float]) -> None:
    method = TopKAST(sparsity=0.75, backward_sparsity=0.5, penalty=penalty, strength=0.5, interval=2)
    model, sparsifier, optimizer = toy(method, [4.0, -2.0, 1.0, 0.5])
    assert kept(sparsifier) == [True, False, False, False]
    assert model.row(torch.ones(1, 4)).item() == 4.0
    step(model, optimizer, [1.0, 1.0, 1.0, 1.0])
    assert model.values == expected
    assert kept(sparsifier) == [True, False, False, False]


def test_top_kast_chooses_anew_when_an_interval_is_over() -> None:
    method = TopKAST(sparsity=0.75, backward_sparsity=0.5, strength=0.0, interval=2)
    model, sparsifier, optimizer = toy(method, [4.0, -2.0, 1.0, 0.5])
    step(model, optimizer, [0.0, 30.0, 90.0, 0.0])
    assert (model.values, kept(sparsifier)) == ([4.0, -5.0, 1.0, 0.5], [True, False, False, False])
    step(model, optimizer, [35.0, 0.0, 0.0, 0.0])
    assert (model.values, kept(sparsifier)) == ([0.5, -5.0, 1.0, 0.5], [False, True, False, False])
    step(model, optimizer, [10.0, 10.0, 10.0, 10.0])  # B is now the second and third
    assert model.values == [0.5, -6.0, 0.0, 0.5]


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_top_kast_leaves_weights_outside_the_larger_set_as_they_are(block: int, kind: Any) -> None:
    """Bit for bit, whatever momentum, moments and weight decay the optimizer has from when they were inside.

    Blocks divide the first layer, and cut the second one's.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 26), nn.ReLU(), nn.Linear(26, 3))
    method = TopKAST(sparsity=0.8, backward_sparsity=0.5, block_size=block, interval=3, strength=1e-2)
    sparsifier = Sparsifier(model, method, 20)
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **settings)
    sparsifier.attach(optimizer)
    left_and_returned = 0
    for index in range(12):
        before = [tensor.weight.detach().clone() for tensor in sparsifier._masks.tensors]
        inside = [tensor.expand(tensor.carrier.mask_backward).clone() for tensor in sparsifier._masks.tensors]
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        functional.mse_loss(model(x), x[:, :3]).backward()
        optimizer.step()
        for tensor, old, there in zip(sparsifier._masks.tensors, before, inside, strict=True):
            assert torch.equal(tensor.weight[~there], old[~there])
            assert bool((tensor.weight[there] != old[there]).any())
            now = tensor.expand(tensor.carrier.mask_backward)
            assert not bool((tensor.carrier.mask_hard & ~tensor.carrier.mask_backward).any())
            left_and_returned += int((now != there).sum())
            assert tensor.remembered is None
    assert left_and_returned > 0
    dropped = sum(int((~tensor.expand(tensor.carrier.mask_backward)).sum()) for tensor in sparsifier._masks.tensors)
    assert 0 <= dropped - 0.5 * sum(p.numel() for p in model.parameters()) < block * block


def test_top_kast_multiplies_and_differentiates_by_blocks() -> None:
    """Through `masked_linear`: forward on A, weight gradient on B and nowhere else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 2))
    method = TopKAST(sparsity=0.75, backward_sparsity=0.5, block_size=4)
    sparsifier = Sparsifier(model, method, 10, count="masked")
    tensor = sparsifier._masks.tensors[0]
    forward, backward = tensor.expand(tensor.carrier.mask_hard), tensor.expand(tensor.carrier.mask_backward)
    assert (int(forward.sum()), int(backward.sum())) == (48, 96)
    x, weight = torch.randn(5, 12), model[0].weight.detach()
    y = model[0](x)
    torch.testing.assert_close(y, functional.linear(x, weight * forward, model[0].bias))
    pull = torch.randn_like(y)
    y.backward(pull)
    torch.testing.assert_close(model[0].weight.grad, (pull.T @ x) * backward)


def test_top_kast_penalty_is_the_same_where_the_optimizer_unscales() -> None:
    """A fused optimizer reads scaled gradients: what is added to them has to be scaled as well."""
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        method = TopKAST(sparsity=0.75, backward_sparsity=0.5, strength=0.5)
        model, _, optimizer = toy(method, [4.0, -2.0, 1.0, 0.5], fused=True)
        loss = model.pull([1.0, 1.0, 1.0, 1.0])
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        results.append(model.values)
    assert results == [[3.7, -1.7, 1.0, 0.5]] * 2


def test_dual_averaging_steps_by_hand() -> None:
    model, sparsifier, optimizer = toy(DualAveraging(sparsity=0.5, ramp=0.0), [4.0, -3.0, 2.0, 1.0])
    assert kept(sparsifier) == [True, True, False, False]
    step(model, optimizer, [0.0, -15.0, 0.0, -10.0])  # dropped weights learn from the sparse network's gradient
    assert (model.values, kept(sparsifier)) == ([4.0, -1.5, 2.0, 2.0], [True, False, True, False])
    for _ in range(7):
        step(model, optimizer, [0.0, 0.0, 0.0, 0.0])
    assert sparsifier.frozen
    assert model.values == [4.0, 0.0, 2.0, 0.0]
    step(model, optimizer, [0.0, 10.0, 10.0, 10.0])
    sparsifier.finalize()
    assert model.values == [4.0, 0.0, 1.0, 0.0]


def test_dual_averaging_is_spartan_without_the_soft_mask() -> None:
    """Its kept weights follow the same linear ramp, and all of them get the masked weight's dense gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    sparsifier = Sparsifier(model, DualAveraging(sparsity=0.8), 100, count="masked")
    for index in range(1, 80):
        sparsifier.step()
        assert abs(sparsifier.sparsity - 0.8 * min(index / 20, 1)) <= 1 / 600
    threshold = model[0].weight.detach().abs().flatten().sort(descending=True).values[119]
    assert torch.equal(next(iter(sparsifier.masks().values())).hard, model[0].weight.abs() >= threshold)
    x, pull = torch.randn(5, 20), torch.randn(5, 30)
    model[0](x).backward(pull)
    torch.testing.assert_close(model[0].weight.grad, pull.T @ x)


def test_dpf_prunes_every_interval_along_a_cubic_ramp() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    sparsifier = Sparsifier(model, DPF(sparsity=0.8, interval=16), 200, count="masked")
    for index in range(1, 200):
        sparsifier.step()
        expected = 0.8 * (1 - (1 - min(index // 16 * 16 / 100, 1)) ** 3)
        assert abs(sparsifier.sparsity - expected) <= 1 / 600, index
    assert not sparsifier.frozen
    model[0](torch.randn(5, 20)).sum().backward()
    assert bool((model[0].weight.grad != 0).all())


def test_iht_steps_by_hand() -> None:
    model, sparsifier, optimizer = toy(IHT(sparsity=0.5), [4.0, -3.0, 2.0, 1.0])
    assert model.values == [4.0, -3.0, 0.0, 0.0]
    step(model, optimizer, [0.0, -15.0, 0.0, -20.0])  # 4, -1.5, 0, 2
    assert (model.values, kept(sparsifier)) == ([4.0, 0.0, 0.0, 2.0], [True, False, False, True])
    step(model, optimizer, [0.0, 5.0, 0.0, 0.0])
    assert model.values == [4.0, 0.0, 0.0, 2.0]


def test_iht_recovers_a_sparse_signal() -> None:
    """y = X w with a k-sparse w and orthonormal X^T X: the iteration's fixed point is w itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    signal = torch.zeros(40)
    signal[torch.randperm(40, generator=generator)[:5]] = torch.randn(5, generator=generator).sign() * 2
    model = Toy(torch.randn(40, generator=generator).tolist())
    sparsifier = Sparsifier(model, IHT(sparsity=0.875), 50, include="row.weight", count="masked")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsifier.attach(optimizer)
    for _ in range(50):
        optimizer.zero_grad()
        (0.5 * (model.row(x)[:, 0] - x @ signal).square().sum()).backward()
        optimizer.step()
    sparsifier.finalize()
    torch.testing.assert_close(model.row.weight[0].detach(), signal, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopKAST(sparsity=0.5, backward_sparsity=0.6), ValueError, r"backward_sparsity must be in \[0, 0.5\]"),
        (lambda: TopKAST(sparsity=0.5, backward_sparsity=0.2, penalty="l0"), ValueError, "penalty must be one of l1"),
        (lambda: TopKAST(sparsity=0.5, backward_sparsity=0.2, strength=-1), ValueError, r"strength must be in \[0"),
        (lambda: TopKAST(sparsity=0.5, backward_sparsity=0.2, interval=0), ValueError, "interval must be an int"),
        (lambda: TopKAST(sparsity=0.5, backward_sparsity=None), TypeError, "backward_sparsity must be a number"),
        (lambda: DualAveraging(sparsity=0.5, ramp=0.9), ValueError, r"ramp must be at most freeze \(0.8\); got 0.9"),
        (lambda: DPF(sparsity=0.5, interval=1.5), ValueError, "interval must be an int of at least 1 .* got 1.5"),
        (lambda: IHT(sparsity=0.5, freeze=1.5), ValueError, r"freeze must be in \[0, 1\]; got 1.5"),
    ],
)
def test_bad_settings_are_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
