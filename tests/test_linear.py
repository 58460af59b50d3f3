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


@pytest.fixture(params=[None, (4, 8)], ids=["dense", "blocks"])
def product(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both products that a layer may multiply with: PyTorch's, and that of all blocks."""
    block = request.param
    names = ("float32", "bfloat16") if block else ()
    with using(tuple(Crossing(name, *block, few, None, 0.5) for name in names for few in (True, False))):
        yield


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
