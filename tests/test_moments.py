"""What optimizers keep for weights that are dropped or grown does not move what a method says stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan import GMP, GSE, IHT, SET, DualAveraging, OneShot, RigL, Sparsifier, Spartan, StaticRandom, TopKAST
from spartan.masks import MaskedTensor

TOTAL_STEPS = 24


pytestmark = pytest.mark.usefixtures("one_thread")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.5, decoupled_weight_decay=True),
}
DIVISORS = ("exp_avg_sq", "square_avg", "sum", "exp_inf", "step_size")  # zero would make a step infinite, or none
ADAPTIVE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.02, etas=(0.9, 1.1)),
}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)
blocks = pytest.mark.parametrize("block", [1, 4])


class Run:
    """A network in training by a method and an optimizer, one step at a time."""

    def __init__(self, method: Any, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 26, bias=False), nn.Tanh(), nn.Linear(26, 3)
        )
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.sparsifier = Sparsifier(self.model, method, TOTAL_STEPS, count="masked")
        self.sparsifier.attach(self.optimizer)
        self.generator = torch.Generator().manual_seed(1)

    @property
    def tensors(self) -> list[MaskedTensor]:
        return self.sparsifier._masks.tensors

    def hard(self) -> list[torch.Tensor]:
        return [tensor.expand(tensor.carrier.mask_hard).clone() for tensor in self.tensors]

    def weights(self) -> list[torch.Tensor]:
        return [tensor.weight.detach().clone() for tensor in self.tensors]

    def moments(self, tensor: MaskedTensor) -> dict[str, torch.Tensor]:
        states = self.optimizer.state[tensor.weight].items()
        return {k: v for k, v in states if isinstance(v, torch.Tensor) and v.shape == tensor.weight.shape}

    def step(self) -> None:
        x = torch.randn(16, 20, generator=self.generator)
        self.optimizer.zero_grad()
        functional.mse_loss(self.model(x), x[:, :3] * x[:, 3:6]).backward()
        self.optimizer.step()


@optimizers
@blocks
def test_top_kast_keeps_weights_outside_the_larger_set(optimizer: str, block: int) -> None:
    """Bit for bit, whatever they have from when they were inside."""
    method = TopKAST(sparsity=0.8, backward_sparsity=0.5, block_size=block, interval=3, strength=1e-2)
    run = Run(method, optimizer)
    crossed = 0
    for _ in range(12):
        before = run.weights()
        inside = [tensor.expand(tensor.carrier.mask_backward).clone() for tensor in run.tensors]
        run.step()
        for old, there, tensor in zip(before, inside, run.tensors, strict=True):
            assert torch.equal(tensor.weight[~there], old[~there])
            assert bool((tensor.weight[there] != old[there]).all())
            crossed += int((tensor.expand(tensor.carrier.mask_backward) != there).sum())
    assert crossed > 0


@optimizers
@blocks
def test_iht_leaves_zeros_outside_its_support_which_moves(optimizer: str, block: int) -> None:
    run = Run(IHT(sparsity=0.8, block_size=block, freeze=0.5), optimizer)
    changed, collected = 0, 0.0
    for index in range(TOTAL_STEPS):
        before = run.hard()
        run.step()
        for old, now, tensor in zip(before, run.hard(), run.tensors, strict=True):
            assert bool((tensor.weight[~now] == 0).all())
            if index < 11:
                changed += int((old != now).sum())
                collected += float(sum(moment[~now].abs().sum() for moment in run.moments(tensor).values()))
    assert changed > 0 and collected > 0
    assert run.sparsifier.frozen


@optimizers
@blocks
@pytest.mark.parametrize("kind", [RigL, SET, GSE])
def test_grown_weights_begin_at_zero_without_a_past(kind: Any, optimizer: str, block: int) -> None:
    run = Run(kind(sparsity=0.8, block_size=block, interval=3, end=0.9, fraction=0.5), optimizer)
    grown = 0
    for _ in range(12):
        before = run.hard()
        run.step()
        for old, now, tensor in zip(before, run.hard(), run.tensors, strict=True):
            new = now & ~old
            grown += int(new.sum())
            moments = run.moments(tensor)
            assert moments
            for name, state in (("weight", tensor.weight), *moments.items()):
                assert bool((state[new] > 0).all() if name in DIVISORS else (state[new] == 0).all()), name
                assert bool((state[now & old] != 0).any())
            assert bool((tensor.carrier.masked(tensor.weight)[~now] == 0).all())
    assert grown > 0


@pytest.mark.parametrize("optimizer", ADAPTIVE)
@pytest.mark.parametrize("kind", [RigL, SET, GSE])
@pytest.mark.parametrize("block", [1, 2])
def test_first_steps_of_grown_weights_are_no_longer_than_those_of_settled_ones(
    kind: Any, optimizer: str, block: int
) -> None:
    """Under gradients that do not change, and are the same size for all, after enough steps for Adam's bias to go."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 1))
    made = ADAPTIVE[optimizer](model.parameters())
    method = kind(sparsity=0.5, block_size=block, interval=200, fraction=0.5, end=1.0)
    sparsifier = Sparsifier(model, method, 1000, count="masked")
    sparsifier.attach(made)
    (tensor,) = sparsifier._masks.tensors
    signs = torch.randn(16, 16).sign()

    def step() -> torch.Tensor:
        before = tensor.weight.detach().clone()
        made.zero_grad()
        (model[0](torch.eye(16)) * signs.T).sum().backward()
        made.step()
        return (tensor.weight.detach() - before).abs()

    for _ in range(200):
        old = tensor.hard.clone()
        step()
    grown, settled = tensor.expand(tensor.hard & ~old), tensor.expand(tensor.hard & old)
    assert int(grown.sum()) >= 8
    for _ in range(12):
        moved = step()
        assert float(moved[grown].max()) <= 1.001 * float(moved[settled].max())
        assert float(moved[grown].min()) > 0


FREEZING = {
    "spartan": lambda block: Spartan(sparsity=0.8, block_size=block, anneal=0.5),
    "dual averaging": lambda block: DualAveraging(sparsity=0.8, block_size=block, freeze=0.5),
    "top-kast": lambda block: TopKAST(sparsity=0.8, backward_sparsity=0.5, block_size=block, interval=3, freeze=0.5),
    "gmp": lambda block: GMP(sparsity=0.8, block_size=block, interval=2, end=0.5),
    "one-shot": lambda block: OneShot(sparsity=0.8, block_size=block),
    "rigl": lambda block: RigL(sparsity=0.8, block_size=block, interval=3, end=0.5),
    "static": lambda block: StaticRandom(sparsity=0.8, block_size=block),
}


@optimizers
@blocks
@pytest.mark.parametrize("method", FREEZING)
def test_dropped_weights_rest_at_zero_once_masks_are_fixed(method: str, optimizer: str, block: int) -> None:
    """In the parameters themselves, so that copies of them, averages and saved states are sparse too."""
    run = Run(FREEZING[method](block), optimizer)
    for index in range(20):
        run.step()
        assert run.sparsifier.frozen == (index + 1 >= TOTAL_STEPS // 2 or method == "static")
        if run.sparsifier.frozen:
            for now, tensor in zip(run.hard(), run.tensors, strict=True):
                assert bool((tensor.weight[~now] == 0).all())
                assert not bool(now.any()) or bool((tensor.weight[now] != 0).any())
                assert all(bool((moment[~now] == 0).all()) for moment in run.moments(tensor).values())


@optimizers
def test_what_gmp_removed_stays_zero_between_prunings(optimizer: str) -> None:
    run = Run(GMP(sparsity=0.8, interval=4, end=1.0), optimizer)
    removed = 0
    for _ in range(TOTAL_STEPS - 1):
        before = run.hard()
        run.step()
        for old, now, tensor in zip(before, run.hard(), run.tensors, strict=True):
            assert not bool((now & ~old).any())
            assert bool((tensor.weight[~now] == 0).all())
            removed += int((~now).sum())
    assert removed > 0
