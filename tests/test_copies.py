"""Copies of a masked model, averages and snapshots, become plain sparse models, whatever has become of the model."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import spartan
from spartan import RigL, Sparsifier, Spartan, TopKAST
from spartan.methods import Method
from spartan.nn.mask_carrier import MaskCarrier

STEPS = 10
METHODS: list[Method] = [
    Spartan(sparsity=0.6, beta=4.0, beta_units="threshold", preserve_scale=True),
    Spartan(sparsity=0.6, block_size=(4, 2)),
    TopKAST(sparsity=0.6, backward_sparsity=0.3, interval=2),
    RigL(sparsity=0.6, block_size=2, interval=2),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.block_size}")

pytestmark = pytest.mark.usefixtures("one_thread")


class Several(nn.Module):
    """A swapped class, a masked attribute, attention, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of x [n, 6, length]."""
        return self.head(self.second(self.first(self.encoder(self.conv(x).mT)).relu()).mean(1))


def network() -> Several:
    torch.manual_seed(0)
    return Several()


class Run:
    """A network in training; `each` is called with it after each step."""

    def __init__(self, method: Method) -> None:
        self.plain = network()
        self.model = copy.deepcopy(self.plain)
        self.sparsifier = Sparsifier(self.model, method, STEPS, count="masked")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.sparsifier.attach(self.optimizer)

    def train(self, steps: int, each: Callable[[], Any] = lambda: None) -> None:
        for step in range(self.sparsifier.step_count, self.sparsifier.step_count + steps):
            x = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(x), x[:, :4].sum(2).argmax(1)).backward()
            self.optimizer.step()
            each()

    def hard(self) -> dict[str, torch.Tensor]:
        """Each weight's mask, in its shape."""
        return {t.name: t.expand(t.hard).clone() for t in self.sparsifier._masks.tensors}


def shown(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(99)))
    model.train()
    return found


def require_sparse(model: nn.Module, hard: dict[str, torch.Tensor]) -> None:
    """Plain, and zero where the masks are zero, and nowhere else but where a weight that was grown still is."""
    assert not any(isinstance(module, MaskCarrier) for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in network().named_parameters()]
    assert sum(int((~mask).sum()) for mask in hard.values()) > 100
    for name, mask in hard.items():
        kept = model.get_parameter(name) != 0
        assert not bool((kept & ~mask).any()) and int(kept.sum()) >= 0.5 * int(mask.sum()), name


@each_method
@pytest.mark.parametrize("finalized", [False, True])
def test_a_snapshot_keeps_the_masks_that_it_has(method: Method, finalized: bool, tmp_path: Path) -> None:
    run = Run(method)
    run.train(6)
    snapshot, hard, before = copy.deepcopy(run.model), run.hard(), shown(run.model)
    run.train(STEPS - 6)
    if finalized:
        run.sparsifier.finalize()
    spartan.finalize(snapshot)
    require_sparse(snapshot, hard)
    torch.testing.assert_close(shown(snapshot), before)
    spartan.save_pretrained(snapshot, tmp_path)
    torch.testing.assert_close(shown(spartan.load_pretrained(network(), tmp_path)), before)
    if not finalized:
        hard = run.hard()
        run.sparsifier.finalize()
        require_sparse(run.model, hard)


@each_method
def test_an_average_is_finalized_after_the_model(method: Method) -> None:
    run = Run(method)
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    run.train(STEPS, lambda: average.update_parameters(run.model))
    hard, before = run.hard(), shown(average)
    run.sparsifier.finalize()
    spartan.finalize(average)
    require_sparse(average.module, hard)
    torch.testing.assert_close(shown(average), before)
    assert not torch.equal(average.module.head.weight, run.model.head.weight)


def averages(run: Run) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """Averages that have no masks, or wrong ones, and how each follows the model."""
    buffers = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    early, plain, double = copy.deepcopy(run.model), copy.deepcopy(run.plain), copy.deepcopy(run.model).double()

    def follow(average: nn.Module) -> None:
        with torch.no_grad():
            for tensor in run.sparsifier._masks.tensors:
                *path, name = tensor.name.split(".")
                module = average.get_submodule(".".join(path))
                own = module._parameters[name]
                own.lerp_(tensor.weight.to(own.dtype), 0.5)

    return {
        "averages buffers": (buffers.module, lambda: buffers.update_parameters(run.model)),
        "knows parameters alone": (early, lambda: follow(early)),
        "made before the masks": (plain, lambda: follow(plain)),
        "wider": (double, lambda: follow(double)),
    }


@each_method
@pytest.mark.parametrize("finalized", [False, True])
def test_any_average_gets_the_masks_of_now(method: Method, finalized: bool) -> None:
    run = Run(method)
    every = averages(run)
    run.train(STEPS, lambda: [follow() for _, follow in every.values()])
    hard = run.hard()
    if finalized:
        run.sparsifier.finalize()
    for average, _ in every.values():
        run.sparsifier.finalize_copy(average)
        require_sparse(average, hard)
    if not finalized:
        run.sparsifier.finalize()
    require_sparse(run.model, hard)


@each_method
def test_masks_are_copied_after_finalize_too(method: Method) -> None:
    run = Run(method)
    other = copy.deepcopy(run.model)
    run.train(STEPS)
    hard = run.hard()
    run.sparsifier.finalize()
    run.sparsifier.copy_masks(other)
    spartan.finalize(other)
    require_sparse(other, hard)


def test_models_that_are_no_copies_are_refused() -> None:
    run = Run(METHODS[0])
    with pytest.raises(ValueError, match="model must be a copy of a masked model; it has no masks"):
        spartan.finalize(run.plain)
    with pytest.raises(ValueError, match=r"this one is in training by a Sparsifier; call its finalize\(\)"):
        spartan.finalize(run.model)
    with pytest.raises(ValueError, match="in training by a Sparsifier"):
        run.sparsifier.finalize_copy(run.model)
    for other in (nn.Linear(2, 3), nn.Sequential(network())):
        with pytest.raises(ValueError, match=r"model must be a copy of the masked model; it has no such .* in 'conv'"):
            run.sparsifier.finalize_copy(other)


def test_a_model_that_nobody_trains_any_more_is_finalized() -> None:
    run = Run(METHODS[0])
    run.train(6)
    model, hard = run.model, run.hard()
    del run
    gc.collect()
    spartan.finalize(model)
    require_sparse(model, hard)
