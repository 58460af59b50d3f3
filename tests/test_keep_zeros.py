"""Training that starts from a model that is sparse already."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import spartan
import spartan_kernels
from spartan.methods import GMP, Spartan

STEPS = 12
MASKED = (0, 3)


pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4)
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)


def train(model: nn.Module, sparsifier: spartan.Sparsifier, steps: range) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    for index in steps:
        x, y = batch(index)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def sparse_network(block: int) -> nn.Sequential:
    """Trained to zeros, then plain again."""
    model = network()
    sparsifier = spartan.Sparsifier(model, GMP(sparsity=0.4, interval=2, block_size=block), STEPS)
    train(model, sparsifier, range(STEPS))
    sparsifier.finalize()
    return model


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("kind", [GMP, spartan.OneShot, Spartan, spartan.DualAveraging, spartan.IHT])
def test_a_sparse_model_keeps_its_zeros(kind: Any, block: int) -> None:
    model = sparse_network(block)
    before = {name: p.detach() != 0 for name, p in model.named_parameters() if p.dim() > 1}
    method = kind(sparsity=0.6, block_size=block)
    sparsifier = spartan.Sparsifier(model, method, STEPS, keep_zeros=True)
    for name, mask in sparsifier.masks().items():
        kept = mask.hard.repeat_interleave(block, 0).repeat_interleave(block, 1)
        kept = kept[: before[name].shape[0], : before[name].shape[1]]
        assert torch.equal(kept, before[name]) if kind is not spartan.IHT else not bool((kept & ~before[name]).any())
    at_first = sparsifier.sparsity
    assert at_first >= 0.39 or kind is spartan.IHT
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    resumed = spartan.Sparsifier(network(3), method, STEPS)
    for step in range(STEPS):
        if step == 2:
            resumed.load_state_dict(sparsifier.state_dict())
            assert resumed.sparsity == sparsifier.sparsity
            budgets = [[g.budget(0.5) for g in s._masks.groups] for s in (resumed, sparsifier)]
            assert budgets[0] == budgets[1]
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert sparsifier.sparsity >= at_first - 1e-9
    sparsifier.finalize()
    assert sparsifier.sparsity == pytest.approx(0.6, abs=0.05 if block > 1 else 1e-3)
    if kind in (GMP, spartan.OneShot):
        for name, alive in before.items():
            assert not bool((model.get_parameter(name) != 0)[~alive].any()), name


def alive_blocks(model: nn.Module, block: int) -> dict[str, torch.Tensor]:
    """By name of the masked weights, which of their blocks are not zero."""
    return {
        f"{index}.weight": spartan_kernels.block_scores(model[index].weight.detach(), (block, block)) > 0  # type: ignore[index]
        for index in MASKED
    }


FIXED: list[Any] = [
    spartan.GMP(sparsity=0.2, interval=2),
    spartan.OneShot(sparsity=0.2),
    spartan.StaticRandom(sparsity=0.2, distribution="global"),
    spartan.TopKAST(sparsity=0.2, backward_sparsity=0.1, interval=2, freeze=0.7),
]


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("method", FIXED, ids=lambda method: method.name)
def test_a_model_sparser_than_asked_stays_so(method: Any, block: int) -> None:
    model = sparse_network(block)
    before = alive_blocks(model, block)
    method = dataclasses.replace(method, block_size=block)
    sparsifier = spartan.Sparsifier(model, method, STEPS, keep_zeros=True)
    for name, mask in sparsifier.masks().items():
        assert torch.equal(mask.hard, before[name])
    train(model, sparsifier, range(STEPS))
    sparsifier.finalize()
    for name, now in alive_blocks(model, block).items():
        assert torch.equal(now, before[name])


def test_static_masks_of_a_sparse_model_are_the_largest_that_fit() -> None:
    model = sparse_network(1)
    largest = copy.deepcopy(model)
    spartan.Sparsifier(largest, spartan.OneShot(sparsity=0.7, prune_at=0.0), STEPS).finalize()
    sparsifier = spartan.Sparsifier(
        model, spartan.StaticRandom(sparsity=0.7, distribution="global"), STEPS, keep_zeros=True
    )
    train(model, sparsifier, range(STEPS))
    for name, mask in sparsifier.masks().items():
        assert torch.equal(mask.hard, largest.get_parameter(name) != 0)


@pytest.mark.parametrize("block", [1, 4])
def test_zeros_never_enter_the_sets_of_top_kast(block: int) -> None:
    model = sparse_network(block)
    before = alive_blocks(model, block)
    # A keeps 40 % of all weights, B would keep 80 %, of which 60 % are not zero.
    method = spartan.TopKAST(sparsity=0.6, backward_sparsity=0.2, interval=2, block_size=block)
    sparsifier = spartan.Sparsifier(model, method, STEPS, keep_zeros=True)
    resumed_model = network(3)
    resumed = spartan.Sparsifier(resumed_model, method, STEPS)
    train(model, sparsifier, range(3))
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(sparsifier.state_dict())
    train(resumed_model, resumed, range(3, STEPS - 1))
    assert resumed.sparsity == pytest.approx(0.6, abs=0.05 if block > 1 else 1e-3)
    for name, state in resumed.state_dict()["masks"].items():
        assert torch.equal(state["backward"], before[name])
    for name, now in alive_blocks(resumed_model, block).items():
        assert torch.equal(now, before[name])


@pytest.mark.parametrize("sparsity", [0.2, 0.6])
@pytest.mark.parametrize("kind", [spartan.RigL, spartan.SET, spartan.GSE])
def test_rewiring_begins_with_what_is_not_zero(kind: Any, sparsity: float) -> None:
    model = sparse_network(1)
    before = alive_blocks(model, 1)
    method = kind(sparsity=sparsity, distribution="global", interval=2, fraction=0.5)
    sparsifier = spartan.Sparsifier(model, method, STEPS, keep_zeros=True)
    for name, mask in sparsifier.masks().items():
        assert not bool((mask.hard & ~before[name]).any())
        assert torch.equal(mask.hard, before[name]) or sparsity == 0.6
    assert sparsifier.sparsity == pytest.approx(max(sparsity, 0.4), abs=1e-3)
    train(model, sparsifier, range(STEPS))
    assert sparsifier.sparsity == pytest.approx(sparsity, abs=1e-3)
    assert any(bool((mask.hard & ~before[name]).any()) for name, mask in sparsifier.masks().items())


def test_keep_zeros_is_refused_where_there_is_nothing_to_keep() -> None:
    for method in (spartan.Dense(), spartan.MaskDecay(pattern=None, sparsity=0.5), spartan.WGSEF(sparsity=0.5)):
        with pytest.raises(ValueError, match=rf"keep_zeros is not for {method.name}, which begins with all weights"):
            spartan.Sparsifier(network(), method, STEPS, keep_zeros=True)
    for pattern in (Spartan(pattern=(2, 4)), spartan.SRSTE()):
        with pytest.raises(ValueError, match="keep_zeros is not for a pattern"):
            spartan.Sparsifier(network(), pattern, STEPS, keep_zeros=True)
