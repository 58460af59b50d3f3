"""Gradients of the operators, as kernels of the dispatcher's autograd key.

`torch.library.register_autograd` does the same for eager and compiled code but refuses `torch.func.grad`: its function
is not one that functorch can take apart. Here functorch does what it does for PyTorch's own operators: each of its
levels calls the kernel below for itself, and the kernel hands the call on to the next. That takes private parts of
PyTorch (`spartan_kernels.torch_private`); where one is missing, `register_autograd` serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch

from spartan_kernels.ops import OPERATORS, Operator
from spartan_kernels.torch_private import (
    HAS_LEVELS,
    any_requires_grad,
    below_autograd,
    forward_mode,
    forward_mode_set,
    single_level,
    single_level_function,
    transforms_active,
)

__all__ = ["differentiable", "differentiable_once", "gradients", "wanted"]

_LIBRARY = torch.library.Library("spartan", "FRAGMENT")


class _Rule(NamedTuple):
    operator: Any
    structure: Any
    setup: Callable[[Any, Any, Any], None]
    backward: Callable[..., dict[str, Any]]

    def save(self, ctx: Any, operands: Any, needs: Any, output: Any) -> None:
        """Set `ctx.needs`, and let `setup` save what the gradient is computed from."""
        ctx.needs = self.structure(*needs)
        self.setup(ctx, self.structure(*operands), output)

    def gradients(self, ctx: Any, *grads: Any) -> list[Any]:
        """One entry for each operand, None where `backward` gives none."""
        found = self.backward(ctx, *grads)
        return [found.get(field) for field in self.structure._fields]


class _Gradient(single_level_function):  # type: ignore[misc]
    """One call of an operator in the graph. Lists of tensors travel flat: autograd sees tensors only as arguments."""

    @staticmethod
    def forward(ctx: Any, rule: _Rule, call: Any, lengths: Any, output_lengths: list[Any], *flat: Any) -> Any:
        operands = _nested(flat, lengths)
        output = call(operands)
        ctx.rule, ctx.lengths, ctx.output_lengths = rule, lengths, output_lengths
        rule.save(ctx, operands, _nested(ctx.needs_input_grad[4:], lengths), output)
        if isinstance(output, torch.Tensor):
            return output
        output_lengths += _lengths(output)
        return tuple(_flat(output))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{ctx.rule.operator} has no forward-mode derivative (jvp, jacfwd, hessian)")

    @staticmethod
    def backward(ctx: Any, *flat_grads: Any) -> Any:
        grads = _nested(flat_grads, ctx.output_lengths) if ctx.output_lengths else flat_grads
        result = ctx.rule.gradients(ctx, *grads)
        spread: list[Any] = [None] * 4
        for grad, length in zip(result, ctx.lengths, strict=True):
            entry = _spread(grad, length)
            spread += [entry] if length is None else entry
        return tuple(spread)


def differentiable(name: str, setup: Callable[[Any, Any, Any], None], backward: Callable[..., dict[str, Any]]) -> None:
    """Give `spartan::name` the gradient `backward(ctx, *grads)`: by name of the operand, for those that have one.

    `setup(ctx, operands, output)` saves what it needs. `operands` is the operator's structure
    (`spartan_kernels.operands`); `ctx.needs` is one too and says, in both, which operands need a gradient.
    """
    operator = OPERATORS[name]
    rule = _Rule(operator.overload, operator.structure, setup, backward)
    if HAS_LEVELS:
        _by_level(name, operator, rule)
    else:
        _registered(name, rule)


def wanted(needs: Any, names: Sequence[str]) -> list[bool]:
    """Which of the operands `names` need a gradient, as the operators of gradients take it."""
    return [getattr(needs, name) for name in names]


def gradients(needs: Any, names: Sequence[str], grads: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of the operands `names` that need one, by name."""
    return {name: grad for name, grad in zip(names, grads, strict=True) if getattr(needs, name)}


def _by_level(name: str, operator: Operator, rule: _Rule) -> None:
    """The gradient as a kernel that each level of torch.func calls."""

    def apply(call: Any, lengths: Any, flat: Any) -> Any:
        output_lengths: list[Any] = []
        output = _Gradient.apply(rule, call, lengths, output_lengths, *flat)
        if isinstance(output, torch.Tensor):
            return output
        nested = _nested(output, output_lengths)
        return list(nested) if operator.returns_list else nested

    def kernel(keyset: Any, *operands: Any) -> Any:
        if not _recorded(operands):
            return below_autograd(rule.operator, keyset, operands)

        def call(operands: Any) -> Any:
            # Both modes are off inside a function's forward; functorch levels below this one must still record.
            below = transforms_active()
            with torch.set_grad_enabled(below), forward_mode_set(below):
                return below_autograd(rule.operator, keyset, operands)

        with single_level():
            return apply(call, _lengths(operands), _flat(operands))

    def record(*operands: Any) -> Any:
        return apply(lambda operands: operator.serve(*operands), _lengths(operands), _flat(operands))

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    operator.record = record


def _registered(name: str, rule: _Rule) -> None:
    """The same through PyTorch's public way, whose functions torch.func refuses."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        tensors = [isinstance(x, (list, tuple)) and all(isinstance(t, torch.Tensor) for t in x) for x in inputs]
        # what PyTorch takes apart: lists of tensors; other lists are one operand
        ctx.lengths = tuple([len(x) if of_tensors else None for x, of_tensors in zip(inputs, tensors, strict=True)])
        rule.save(ctx, inputs, _nested(ctx.needs_input_grad, ctx.lengths), output)

    def backward(ctx: Any, *grads: Any) -> Any:
        result = zip(rule.gradients(ctx, *grads), ctx.lengths, strict=True)
        return tuple([_spread(grad, length) for grad, length in result])

    torch.library.register_autograd(f"spartan::{name}", backward, setup_context=setup, lib=_LIBRARY)


def _spread(grad: Any, length: int | None) -> Any:
    """A gradient in the shape of its operand: one for each tensor of a list."""
    if length is None:
        return None if isinstance(grad, (list, tuple)) else grad
    return [None] * length if grad is None else list(grad)


def differentiable_once(name: str, of: str) -> None:
    """Let `spartan::name`, the gradient of the public function `of`, refuse to be differentiated in turn."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"spartan.{of} is differentiable once; a derivative of its gradient (create_graph=True and a second"
            " backward, gradgradcheck, hessian) is not implemented"
        )

    differentiable(name, lambda ctx, operands, output: None, refuse)


def _recorded(operands: Any) -> bool:
    """Whether autograd must see the call: for a graph, or to refuse the tangents of forward mode."""
    return forward_mode() or (torch.is_grad_enabled() and any_requires_grad(*operands))


def _lengths(nested: Any) -> tuple[int | None, ...]:
    return tuple([len(x) if isinstance(x, (list, tuple)) else None for x in nested])


def _flat(nested: Any) -> list[Any]:
    return list(chain.from_iterable([x if isinstance(x, (list, tuple)) else (x,) for x in nested]))


def _nested(flat: Any, lengths: Any) -> tuple[Any, ...]:
    entries = iter(flat)
    return tuple([next(entries) if n is None else list(islice(entries, n)) for n in lengths])
