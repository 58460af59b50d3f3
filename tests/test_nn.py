"""Masked modules: forward, gradient, names, and compilation while the masks change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from spartan.methods import GMP, OneShot, Spartan, StaticRandom
from spartan.nn import MaskedConv2d, MaskedLinear, MaskedWeight, mask_weight, unmask_weight
from spartan.sparsifier import Sparsifier
from spartan_kernels import expand_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


def masked(module: nn.Module, block_size: tuple[int, int] = (1, 1), **options: Any) -> Any:
    """`module` with random masks, and what carries them."""
    carrier = mask_weight(module, block_size, soft=True, **options)
    generator = torch.Generator().manual_seed(0)
    assert carrier.mask_soft is not None
    carrier.mask_soft.copy_(torch.rand(carrier.mask_soft.shape, generator=generator))
    carrier.mask_hard.copy_(torch.rand(carrier.mask_hard.shape, generator=generator) < 0.5)
    carrier.mask_beta.fill_(3.0)
    return carrier


MODULES = [
    (lambda: nn.Linear(9, 7), (5, 9), MaskedLinear),
    (lambda: nn.Linear(9, 7, bias=False), (2, 3, 9), MaskedLinear),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 8, 8), MaskedConv2d),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 8, 8), MaskedConv2d),
    (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8), MaskedWeight),
    (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), MaskedWeight),
]


@pytest.mark.parametrize(("make", "shape", "kind"), MODULES)
def test_forward_uses_the_masked_weight_and_undoing_it_gives_the_module_back(
    make: Any, shape: tuple[int, ...], kind: type
) -> None:
    torch.manual_seed(0)
    module = make()
    plain, parameter = copy.deepcopy(module), module.weight
    carrier = masked(module)
    assert type(carrier) is kind
    assert any(p is parameter for p in module.parameters())
    with torch.no_grad():
        plain.weight.mul_(carrier.mask_soft * carrier.mask_hard)
    x = torch.randn(shape)
    torch.testing.assert_close(module(x), plain(x))
    unmask_weight(module, carrier)
    assert type(module) is type(plain)
    assert module.weight is parameter
    assert list(module.state_dict()) == list(plain.state_dict())
    assert not list(module.buffers())
    assert set(vars(module)) == set(vars(plain))


def test_blocks_of_a_convolution_are_per_kernel_position() -> None:
    module = nn.Conv2d(5, 6, 3)
    carrier = masked(module, (4, 4))
    assert carrier.mask_hard.shape == (2, 2, 3, 3)
    assert float((carrier.mask_costs).sum()) == module.weight.numel()
    expanded = carrier.mask_hard.repeat_interleave(4, 0)[:6].repeat_interleave(4, 1)[:, :5]
    assert torch.equal(carrier.masked(module.weight) != 0, expanded)


def test_a_weight_that_others_read_is_masked_wherever_it_is_read() -> None:
    module = nn.Linear(9, 7)
    carrier = masked(module, read_elsewhere=True)
    assert isinstance(module, nn.Linear) and list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module.weight != 0, carrier.mask_hard)


def test_fixed_masks_block_gradients_of_dropped_weights() -> None:
    module = nn.Linear(9, 7)
    carrier = mask_weight(module, (1, 1), soft=False)
    carrier.mask_hard[3] = False
    module(torch.randn(4, 9)).sum().backward()
    assert bool((module.weight.grad[3] == 0).all())
    assert bool((module.weight.grad[:3] != 0).all())


def test_copies_and_pickles_keep_their_own_masks() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    sparsifier = Sparsifier(model, Spartan(sparsity=0.5), 20)
    for _ in range(6):
        sparsifier.step()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    x = torch.randn(4, 20)
    before = model(x)
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(30, 20))
    sparsifier.step()
    assert not torch.equal(model(x), before)
    for other in copies:
        assert torch.equal(other(x), before)


def test_masks_follow_the_module_to_another_dtype() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    sparsifier = Sparsifier(model, OneShot(sparsity=0.5), 2)
    model.to(torch.bfloat16)
    sparsifier.step()
    sparsifier.finalize()
    assert model[0].weight.dtype == torch.bfloat16
    assert int((model[0].weight == 0).sum()) >= round(0.5 * 723)


class Conv(nn.Module):
    """A convolution, a parametrized kind and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.line = nn.Conv1d(4, 5, 3)
        self.hidden = nn.Linear(70, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images [n, 1, 6, 6]."""
        return self.head(functional.relu(self.hidden(self.line(self.conv(x).flatten(2)).flatten(1))))


def test_compiled_model_does_not_recompile_while_masks_change() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    frames = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal frames
        frames += 1
        return graph.forward

    model = Conv()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=count, fullgraph=True)
    runs = []
    for network, call in ((model, compiled), (eager, eager)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        sparsifier = Sparsifier(network, Spartan(sparsity=0.6), 20)
        sparsifier.attach(optimizer)
        generator = torch.Generator().manual_seed(1)
        losses, seen = [], []
        for _ in range(20):
            x = torch.randn(4, 1, 6, 6, generator=generator)
            optimizer.zero_grad()
            loss = functional.cross_entropy(call(x), torch.arange(4) % 3)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seen.append(frames)
        runs.append(losses)
        if network is model:
            assert seen[0] == seen[15] == 1  # masks and beta changed in every step
            assert seen[19] == 2  # once more, when they are merged and fixed
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert len(set(runs[0])) == 20


@pytest.mark.parametrize(
    "method", [Spartan(sparsity=0.6, block_size=(4, 8)), GMP(sparsity=0.6, block_size=4, interval=1)]
)
def test_kept_blocks_are_indexed_whenever_the_masks_change(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 26), nn.Linear(26, 3))
    sparsifier = Sparsifier(model, method, 20)

    def require_index(network: nn.Module) -> int:
        kept = 0
        for layer in (m for m in network.modules() if isinstance(m, MaskedLinear)):
            assert torch.equal(layer._layout().mask(), layer.mask_hard)
            kept += int(layer.mask_hard.sum())
        return kept

    counts = {require_index(model)}
    for _ in range(12):
        sparsifier.step()
        counts.add(require_index(model))
    assert len(counts) > 4
    other = copy.deepcopy(model)
    for layer in other[:3:2]:
        unmask_weight(layer, layer)
    Sparsifier(other, method, 20).load_state_dict(sparsifier.state_dict())
    assert require_index(other) == require_index(model)
    for _ in range(8):
        sparsifier.step()
    assert sparsifier.frozen and require_index(model) == min(counts)


def test_compiled_blocks_train_as_eager_ones_without_recompiling() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 26), nn.Linear(26, 3))
    eager = copy.deepcopy(model)
    runs = []
    for network, call in ((model, torch.compile(model, backend=frames, fullgraph=True)), (eager, eager)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        sparsifier = Sparsifier(network, Spartan(sparsity=0.6, block_size=4, preserve_scale=True), 20)
        sparsifier.attach(optimizer)
        generator = torch.Generator().manual_seed(1)
        losses, seen = [], []
        for _ in range(20):
            x = torch.randn(9, 20, generator=generator)
            optimizer.zero_grad()
            loss = functional.cross_entropy(call(x), torch.arange(9) % 3)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seen.append(frames.frame_count)
        runs.append(losses)
        if network is model:
            assert seen[0] == seen[15] == seen[19] - 1  # once more, when the masks are merged and fixed
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_masked_model_compiles_for_inference_with_random_masks() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    Sparsifier(model, StaticRandom(sparsity=0.5, block_size=4), 10)
    x = torch.randn(4, 20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_convolution_masked_by_blocks_is_that_with_the_masked_weight(soft: bool, density: float) -> None:
    """Value and gradients, whether the kept blocks or PyTorch's own convolution are taken."""
    torch.manual_seed(0)
    module = nn.Conv2d(64, 96, 3, stride=2, padding=1)
    carrier = mask_weight(module, (16, 16), soft=soft, preserve_scale=True)
    carrier.mask_hard.copy_(torch.rand(carrier.mask_hard.shape) <= density)
    carrier.masks_changed()
    carrier.mask_beta.fill_(3.0)
    assert carrier.mask_scale is not None
    carrier.mask_scale.fill_(1.5)
    if carrier.mask_soft is not None:
        carrier.mask_soft.copy_(torch.rand(carrier.mask_soft.shape))
    x = torch.randn(2, 64, 9, 9, requires_grad=True)
    leaves = [x, module.weight, module.bias]
    actual, expected = module(x), functional.conv2d(x, carrier.masked(module.weight), module.bias, 2, 1)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    grads = zip(*(torch.autograd.grad(y, leaves, upstream) for y in (actual, expected)), strict=True)
    for got, want in grads:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [(1, 1), (8, 8)], ids=str)
def test_a_convolution_follows_its_hard_mask(block_size: tuple[int, int]) -> None:
    """The mask that is written out for the dense convolution is that of now; what is dropped takes no part."""
    torch.manual_seed(0)
    module = nn.Conv2d(12, 20, 3)
    carrier = mask_weight(module, block_size, soft=False)
    x, plain = torch.randn(2, 12, 5, 5), dict(vars(nn.Conv2d(12, 20, 3)))
    for _ in range(3):
        carrier.mask_hard.copy_(torch.rand(carrier.mask_hard.shape) < 0.9)
        carrier.masks_changed()
        kept = expand_blocks(carrier.mask_hard, module.weight.shape, block_size)
        with torch.no_grad():
            module.weight.masked_fill_(~kept, torch.inf)
        y = module(x)
        expected = functional.conv2d(x, torch.where(kept, module.weight, 0.0), module.bias)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(y.sum(), module.weight)
        assert gradient[kept].all() and not gradient[~kept].any()
        with torch.no_grad():
            module.weight.copy_(torch.randn_like(module.weight))
    unmask_weight(module, carrier)
    assert type(module) is nn.Conv2d and vars(module).keys() == plain.keys()
