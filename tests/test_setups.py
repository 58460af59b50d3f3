"""The setups people train in: mixed precision, clipping, compiled models, checkpointed activations, averages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import spartan
from spartan.methods import GMP, GSE, WGSEF, Method, Powerpropagation, RigL, Spartan, TopKAST

STEPS = 12
METHODS: list[Method] = [
    Spartan.paper(sparsity=0.6, beta=20.0, preserve_scale=True),
    Spartan.paper(sparsity=0.6, beta=20.0, block_size=(4, 2)),
    TopKAST(sparsity=0.6, backward_sparsity=0.3, interval=2, block_size=4, freeze=0.7),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.block_size}")


pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4)
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)


class Run:
    """A model in training; `forward` says how it is called."""

    def __init__(
        self,
        method: Method,
        forward: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda model, x: model(x),
        groups: Callable[[nn.Module], Any] = lambda model: model.parameters(),
        fused: bool = False,
    ) -> None:
        self.model = network()
        self.sparsifier = spartan.Sparsifier(self.model, method, STEPS)
        self.optimizer = torch.optim.AdamW(groups(self.model), lr=1e-2, fused=fused)
        self.sparsifier.attach(self.optimizer)
        self.forward = forward

    def loss(self, step: int) -> torch.Tensor:
        x, y = batch(step)
        return functional.cross_entropy(self.forward(self.model, x), y)

    def train(self, steps: int, begin: int = 0) -> None:
        for step in range(begin, begin + steps):
            self.optimizer.zero_grad()
            self.loss(step).backward()
            self.optimizer.step()


def require_same(run: Run, other: Run, **tolerance: float) -> None:
    """The same weights and masks; the same bits unless there is a tolerance."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    for (name, found), exact in zip(run.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(found, exact, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for (name, mask), exact in zip(run.sparsifier.masks().items(), other.sparsifier.masks().values(), strict=True):
        assert torch.equal(mask.hard, exact.hard), name


@each_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_no_bit(method: Method, reentrant: bool) -> None:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # In two parts. Batch normalisation would count twice; the reentrant kind wants an input with a gradient.
        assert isinstance(model, nn.Sequential)
        x = model[1](model[0](x))
        return checkpoint(model[2:], x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    run, plain = Run(method, forward), Run(method)
    for one in (run, plain):
        one.train(STEPS)
    assert run.sparsifier.frozen
    require_same(run, plain)


@each_method
def test_compiled_models(method: Method) -> None:
    """Compiled after it is masked, in one graph; masks that move compile nothing anew until they are fixed."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: list[Any] = []

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not compiled:
            compiled.append(torch.compile(model, backend=counter, fullgraph=True))
        return compiled[0](x)  # type: ignore[no-any-return]

    run, plain = Run(method, forward), Run(method)
    run.train(1)
    once = counter.frame_count
    run.train(5, begin=1)
    assert counter.frame_count == once > 0
    run.train(STEPS - 6, begin=6)
    assert run.sparsifier.frozen and counter.frame_count <= 3 * once
    plain.train(STEPS)
    require_same(run, plain, rtol=1e-5, atol=1e-6)


def test_a_compiled_model_can_be_masked() -> None:
    model = torch.compile(network(), backend="aot_eager")
    sparsifier = spartan.Sparsifier(model, METHODS[0], STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    plain = Run(METHODS[0])
    plain.train(STEPS)
    sparsifier.finalize()
    plain.sparsifier.finalize()
    for found, exact in zip(model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize(
    "method",
    [*METHODS, RigL(sparsity=0.6, interval=2), WGSEF(sparsity=0.6), Powerpropagation(method=GMP(sparsity=0.6))],
    ids=lambda m: f"{m.name}-{m.masking.block_size}",
)
def test_an_overflow_under_amp_leaves_masks_and_clock(method: Method, fused: bool) -> None:
    """A fused optimizer skips inside its own step, which its hooks run around."""
    run = Run(method, lambda model, x: model(x), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        before = {name: (m.soft.clone(), m.hard.clone()) for name, m in run.sparsifier.masks().items()}
        weights = [p.detach().clone() for p in run.model.parameters()]
        count = run.sparsifier.step_count
        run.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss(step)
        scaler.scale(loss * torch.inf if step == 3 else loss).backward()
        scaler.step(run.optimizer)
        scaler.update()
        moved = run.sparsifier.step_count - count
        assert moved == (0 if step == 3 else 1)
        if not moved:
            assert all(torch.equal(a, b) for a, b in zip(weights, run.model.parameters(), strict=True))
            for name, mask in run.sparsifier.masks().items():
                assert torch.equal(mask.soft, before[name][0]) and torch.equal(mask.hard, before[name][1])
    assert scaler.get_scale() == 2.0**9
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


def test_clipping_before_and_after_the_coupling_term() -> None:
    """Before, the correction scales with the gradient, as it is linear in it; after, the norm is exactly the bound."""
    method = METHODS[0]
    run = Run(method)
    run.train(4)
    run.loss(4).backward()
    local = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    norm = float(nn.utils.get_total_norm(local))
    factor = 0.5

    def corrected(scale: float) -> list[torch.Tensor]:
        for p, grad in zip(run.model.parameters(), local, strict=True):
            p.grad = grad * scale
        run.sparsifier.method.correct_gradients(run.sparsifier._masks)
        return [p.grad.clone() for p in run.model.parameters() if p.grad is not None]

    whole = corrected(1.0)
    assert any(not torch.equal(a, b) for a, b in zip(whole, local, strict=True))
    for p, grad in zip(run.model.parameters(), local, strict=True):
        p.grad = grad.clone()
    nn.utils.clip_grad_norm_(run.model.parameters(), norm * factor)
    before = corrected(float(nn.utils.get_total_norm([p.grad for p in run.model.parameters()])) / norm)  # type: ignore[list-item]
    for found, exact in zip(before, whole, strict=True):
        torch.testing.assert_close(found, exact * factor, rtol=1e-4, atol=1e-7)

    by_hand = Run(method)
    assert by_hand.sparsifier._attachment is not None
    by_hand.sparsifier._attachment.remove()
    by_hand.sparsifier._attachment = None
    for step in range(STEPS):
        by_hand.optimizer.zero_grad()
        by_hand.loss(step).backward()
        by_hand.sparsifier.correct_gradients()
        nn.utils.clip_grad_norm_(by_hand.model.parameters(), 0.01)
        total = nn.utils.get_total_norm([p.grad for p in by_hand.model.parameters()])  # type: ignore[list-item]
        assert float(total) <= 0.01 * (1 + 1e-4)
        by_hand.optimizer.step()
        by_hand.sparsifier.step(by_hand.optimizer)
    assert by_hand.sparsifier.frozen


@each_method
def test_parameter_groups(method: Method) -> None:
    """Masked weights in two groups are those in one; a group that stands still keeps its weights."""

    def two(model: nn.Module) -> Any:
        parameters = list(model.parameters())
        return [{"params": parameters[:3]}, {"params": parameters[3:]}]

    def resting(model: nn.Module) -> Any:
        return [{**two(model)[0], "lr": 0.0, "weight_decay": 0.0}, two(model)[1]]

    runs = Run(method), Run(method, groups=two), Run(method, groups=resting)
    for run in runs:
        run.train(4)
    require_same(runs[1], runs[0])
    if method.soft:  # until its mask is merged; Top-KAST's weights, too, only move by their gradients
        assert torch.equal(runs[2].model[0].weight, network()[0].weight)


@pytest.mark.parametrize("method", [*METHODS, GSE(sparsity=0.5, interval=3), GMP(sparsity=0.6, interval=2)])
@pytest.mark.parametrize("begin", [0, 11])
def test_averages_of_the_weights(method: Method, begin: int) -> None:
    """A moving average follows the masks, merged ones too, and finalizes through the model."""
    run = Run(method)
    run.train(begin)
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = [p.detach().clone() for p in run.model.parameters()]
    for step in range(begin, STEPS):
        run.train(1, begin=step)
        average.update_parameters(run.model)
        first = average.n_averaged == 1
        expected = [
            p.detach().clone() if first else torch.lerp(e, p, 0.5)
            for e, p in zip(expected, run.model.parameters(), strict=True)
        ]
    for found, exact in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(found, exact)
    twin = network(1)
    x, _ = batch(0)
    average.eval()
    shown = average(x)
    run.model.load_state_dict(average.module.state_dict())
    run.model.eval()
    torch.testing.assert_close(shown, run.model(x))  # the masks of the average are the model's
    run.sparsifier.finalize()
    twin.load_state_dict(run.model.state_dict())
    assert not any(name.startswith("mask") for name, _ in run.model.named_buffers())


@pytest.mark.parametrize("begin", [0, 11])
@pytest.mark.parametrize(
    "method", [*METHODS, RigL(sparsity=0.6, block_size=4, interval=2)], ids=lambda m: f"{m.name}-{m.block_size}"
)
def test_masks_are_copied_to_averages_that_average_buffers(method: Method, begin: int) -> None:
    """Also to those of other libraries, that know parameters and state dicts alone."""
    run = Run(method)
    run.train(begin)
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    other = copy.deepcopy(run.model)
    for step in range(begin, STEPS):
        run.train(1, begin=step)
        average.update_parameters(run.model)
        run.sparsifier.copy_masks(average.module)
        run.sparsifier.copy_masks(other)
    x, _ = batch(0)
    for model in (average.module, other):
        twin = copy.deepcopy(run.model).eval()
        twin.load_state_dict(model.state_dict())
        model.eval()
        assert torch.equal(model(x), twin(x))
    run.model.load_state_dict(average.module.state_dict())
    run.sparsifier.finalize()


def test_masks_are_copied_to_copies_alone() -> None:
    run = Run(METHODS[1])
    with pytest.raises(ValueError, match=r"model must be a copy of the masked model.*no such masks in '0'"):
        run.sparsifier.copy_masks(network())


@each_method
def test_a_copy_of_a_masked_model_stands_alone(method: Method) -> None:
    run = Run(method)
    run.train(5)
    other = copy.deepcopy(run.model)
    x, _ = batch(0)
    shown = other(x)
    run.train(5, begin=5)
    torch.testing.assert_close(other(x), shown, rtol=0, atol=0)
    other.double()
    assert other(x.double()).dtype is torch.float64


@each_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_names_the_weight_and_leaves_masks(method: Method, bad: float) -> None:
    run = Run(method)
    run.train(3)
    before = {name: (m.soft.clone(), m.hard.clone()) for name, m in run.sparsifier.masks().items()}
    run.optimizer.zero_grad()
    (run.loss(3) * bad).backward()
    with pytest.raises(ValueError, match=r"weight '0.weight' must be finite; \d+ of its entries are NaN"):
        run.optimizer.step()
    for name, mask in run.sparsifier.masks().items():
        assert torch.equal(mask.soft, before[name][0]) and torch.equal(mask.hard, before[name][1])
