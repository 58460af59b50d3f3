"""A linear layer masked weight by weight: the product that computes its gradient in place is the one that does not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import spartan
import spartan.nn.linear
from spartan.functional import masked_weight
from spartan.nn import MaskedLinear, mask_weight
from spartan_kernels.break_even import Crossing, using

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def layer(soft: bool, bias: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A layer [13, 9] with masks somewhere in training."""
    torch.manual_seed(0)
    module: Any = nn.Linear(9, 13, bias=bias, dtype=dtype)
    carrier = mask_weight(module, (1, 1), soft=soft, **options)
    carrier.mask_hard.copy_(torch.rand(13, 9) < 0.5)
    carrier.mask_beta.fill_(3.0)
    if soft:
        carrier.mask_soft.copy_(torch.rand(13, 9))
    if carrier.mask_scale is not None:
        carrier.mask_scale.fill_(1.7)
    return module


def expected_gradients(module: Any, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y, and the gradients of x and the parameters, by the product with `spartan.masked_weight`."""
    w = masked_weight(
        module.weight,
        module.mask_soft,
        module.mask_hard,
        beta=module.mask_beta,
        straight_through=module.mask_straight_through,
    )
    y = functional.linear(x, w if module.mask_scale is None else w * module.mask_scale, module.bias)
    leaves = [x, *module.parameters()]
    return y, list(torch.autograd.grad(y, leaves, upstream))


# what a machine may have measured, for the product that a layer then takes
MEASURED: dict[str, tuple[tuple[int, int, float | None, float | None], ...]] = {
    "dense": ((1, 1, 0.0, None),),
    "blocks": ((8, 8, None, 0.5), (1, 1, 0.0, None)),
    "kept": ((1, 1, None, None),),
}


def measured(product: str) -> tuple[Crossing, ...]:
    return tuple(
        Crossing(name, rows, columns, few, density, whole)
        for name in ("float32", "bfloat16")
        for few in (True, False)
        for rows, columns, density, whole in MEASURED[product]
    )


@pytest.fixture(params=MEASURED)
def product(request: pytest.FixtureRequest) -> Iterator[str]:
    """The products that a layer may multiply with: PyTorch's, that of all blocks, that of the kept weights."""
    with using(measured(request.param)):
        yield request.param


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 9), (9,), (2, 3, 9), (0, 9)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"soft": True},
        {"soft": True, "preserve_scale": True},
        {"soft": False},
        {"soft": False, "straight_through": True},
    ],
)
def test_value_and_gradients(options: dict[str, Any], bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module = layer(bias=bias, dtype=dtype, **options)
    assert type(module) is MaskedLinear
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 13, dtype=dtype)
    y, gradients = expected_gradients(module, x, upstream)
    actual = module(x)
    assert "_InPlace" in str(actual.grad_fn)
    tolerance = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(actual, y, **tolerance)
    for got, want in zip(torch.autograd.grad(actual, [x, *module.parameters()], upstream), gradients, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.usefixtures("product")
def test_used_twice_and_over_batches_gradients_add_up() -> None:
    module = layer(True)
    square = nn.Linear(13, 9)
    xs = [torch.randn(5, 9) for _ in range(3)]
    expected = torch.zeros_like(module.weight)
    for x in xs:
        for first in (x, square(module(x)).detach()):
            upstream = torch.ones(5, 13)
            expected += expected_gradients(module, first.clone().requires_grad_(), upstream)[1][1]
    for x in xs:
        (module(x).sum() + module(square(module(x)).detach()).sum()).backward()
    torch.testing.assert_close(module.weight.grad, expected)


@pytest.mark.usefixtures("product")
def test_frozen_parts_get_no_gradient() -> None:
    module = layer(True)
    module.weight.requires_grad_(False)
    x = torch.randn(5, 9, requires_grad=True)
    upstream = torch.randn(5, 13)
    want = upstream @ module.masked(module.weight)
    module(x).backward(upstream)
    torch.testing.assert_close(x.grad, want)
    assert module.weight.grad is None and module.bias.grad is not None
    module.weight.requires_grad_(True)
    module.bias.requires_grad_(False)
    module(torch.randn(5, 9)).sum().backward()
    assert module.weight.grad is not None


@pytest.mark.usefixtures("product")
def test_checkpointing_and_two_graphs_at_once() -> None:
    module = layer(True)
    x = torch.randn(5, 9, requires_grad=True)
    upstream = torch.randn(5, 13)
    _, want = expected_gradients(module, x, upstream)
    y = checkpoint(module, x, use_reentrant=False)
    other = module(x)
    for result in (y, other):
        got = torch.autograd.grad(result, [x, *module.parameters()], upstream, retain_graph=True)
        for one, expected in zip(got, want, strict=True):
            torch.testing.assert_close(one, expected)
    again = torch.autograd.grad(other, [x, *module.parameters()], upstream)
    for one, expected in zip(again, want, strict=True):
        torch.testing.assert_close(one, expected)


def test_the_gradient_takes_the_memory_of_the_masked_weight() -> None:
    module = layer(True)
    y = module(torch.randn(5, 9))
    place = y.grad_fn.w.data_ptr()
    y.sum().backward()
    assert module.weight.grad.data_ptr() == place


def test_a_weight_that_changed_since_the_forward_is_noticed() -> None:
    module = layer(True)
    y = module(torch.randn(5, 9)).sum()
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("how", ["autocast", "func", "compile", "double"])
def test_what_traces_or_transforms_takes_the_other_way(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(True)
    x = torch.randn(5, 9)
    if how == "double":  # once differentiable, either way
        y = module(x.requires_grad_()).square().sum()
        (grad,) = torch.autograd.grad(y, module.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            grad.sum().backward()
        return
    want = copy.deepcopy(module)(x).square().sum()
    monkeypatch.setattr(spartan.nn.linear._InPlace, "apply", None)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
    elif how == "func":
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        grads = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).square().sum())(parameters)
        monkeypatch.undo()
        module(x).square().sum().backward()
        torch.testing.assert_close(grads["weight"], module.weight.grad)
    else:
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x).square().sum(), want)


@pytest.mark.skipif(not spartan.info()["native"]["available"], reason="needs the compiled CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0.0, 0.03, 1.0])
def test_only_kept_weights_are_multiplied(kept: float, dtype: torch.dtype) -> None:
    """Whatever the shape: columns in and past whole words of the mask, and rows without a kept weight."""
    torch.manual_seed(0)
    for out, in_ in ((3, 1), (5, 64), (7, 200), (130, 67)):
        module: Any = nn.Linear(in_, out, dtype=dtype)
        carrier = mask_weight(module, (1, 1), soft=True)
        carrier.mask_hard.copy_(torch.rand(out, in_) < kept)
        carrier.mask_soft.copy_(torch.rand(out, in_))
        with torch.no_grad():
            module.weight[~carrier.mask_hard] = torch.nan  # not read by y and the gradient of x
        x = torch.randn(33, in_, dtype=dtype, requires_grad=True)
        upstream = torch.randn(33, out, dtype=dtype)
        w = (module.weight.double() * carrier.mask_soft).nan_to_num() * carrier.mask_hard
        with using(measured("kept")):
            y = module(x)
        assert y.grad_fn.block == (1, 1)
        (dx,) = torch.autograd.grad(y, x, upstream)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(y.double(), x.double() @ w.mT + module.bias.double(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(dx.double(), upstream.double() @ w, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not spartan.info()["native"]["available"], reason="needs the compiled CPU kernels")
def test_a_layer_multiplies_by_the_kept_weights_where_they_are_few() -> None:
    """By a model of a CPU, where nothing was measured; with few tokens never."""
    module = layer(True)
    for kept, tokens, block in ((0.5, 2048, None), (0.1, 2048, (1, 1)), (0.1, 128, (1, 1)), (0.1, 16, None)):
        module.mask_hard.copy_(torch.rand(13, 9) < kept)
        with using(()):
            assert module(torch.randn(tokens, 9)).grad_fn.block == block
    with spartan.backend("reference"):
        assert module(torch.randn(2048, 9)).grad_fn.block is None
