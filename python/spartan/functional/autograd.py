"""Gradients of the operators, as kernels of the dispatcher's autograd key.

`torch.library.register_autograd` does the same for eager and compiled code but refuses `torch.func.grad`: its function
is not one that functorch can take apart. Here functorch does what it does for PyTorch's own operators: each of its
levels calls the kernel below for itself, and the kernel hands the call on to the next. That takes private parts of
PyTorch (`spartan_kernels.torch_private`); where one is missing, `register_autograd` serves.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, get_type_hints

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

__all__ = ["differentiable", "differentiable_once", "needed", "saved_number", "without_gradient"]

_LIBRARY = torch.library.Library("spartan", "FRAGMENT")


class _Rule:
    """The gradient of one operator.

    Attributes:
        operator: as PyTorch knows it, for errors and for the dispatcher.
        structure: the declaration of its operands.
        names: the operands that autograd follows.
        setup, backward: what the operator's file says.
    """

    def __init__(self, operator: Operator, names: Sequence[str], setup: Any, backward: Any) -> None:
        self.operator, self.structure = operator.overload, operator.structure
        self.names, self.setup, self.backward = tuple(names), setup, backward
        self.places = tuple([self.structure._fields.index(name) for name in self.names])
        self.needs: Any = namedtuple("Needs", self.names)  # type: ignore[misc]

    def followed(self, o: Any) -> list[Any]:
        """The operands that autograd follows."""
        return [o[place] for place in self.places]

    def save(self, ctx: Any, operands: Any, needs: Any, output: Any) -> None:
        """Set `ctx.needs`, and let `setup` save what the gradient is computed from."""
        ctx.needs = self.needs._make(needs)
        self.setup(ctx, operands, output)


class _Gradient(single_level_function):  # type: ignore[misc]
    """One call of an operator in the graph.

    Autograd sees tensors only as arguments: those that it follows come after the operands, lists of them flat.
    """

    @staticmethod
    def forward(ctx: Any, rule: _Rule, call: Any, operands: Any, lengths: Any, nest: list[Any], *flat: Any) -> Any:
        output = call(operands)
        ctx.rule, ctx.lengths = rule, lengths
        rule.save(ctx, operands, _nested(ctx.needs_input_grad[_BEFORE:], lengths), output)
        if isinstance(output, torch.Tensor):
            ctx.output_lengths = None
            return output
        ctx.output_lengths = _lengths(output)
        nest.append(ctx.output_lengths)
        return tuple(_flat(output, ctx.output_lengths))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{ctx.rule.operator} has no forward-mode derivative (jvp, jacfwd, hessian)")

    @staticmethod
    def backward(ctx: Any, *flat_grads: Any) -> Any:
        found = ctx.rule.backward(ctx, *_nested(flat_grads, ctx.output_lengths))
        if ctx.lengths is None:
            return (*_NOTHING, *found)
        return (*_NOTHING, *chain.from_iterable(map(_spread, found, ctx.lengths)))


_BEFORE = 5  # arguments of `_Gradient` before those that autograd follows
_NOTHING = (None,) * _BEFORE


def differentiable(
    name: str, followed: Sequence[str], setup: Callable[[Any, Any, Any], None], backward: Callable[..., Sequence[Any]]
) -> None:
    """Give `spartan::name` the gradient `backward(ctx, *grads)`: one entry for each operand followed, None for none.

    `followed` are the operands that may need a gradient. `setup(ctx, operands, output)` saves what it needs: `operands`
    is the operator's structure (`spartan_kernels.operands`); `ctx.needs` says, by name, which operands followed need a
    gradient.
    """
    operator = OPERATORS[name]
    rule = _Rule(operator, followed, setup, backward)
    if HAS_LEVELS:
        _by_level(name, operator, rule)
    else:
        _registered(name, rule)


def needed(needs: Sequence[bool], grads: Sequence[Any]) -> list[Any]:
    """The gradients of those operands followed that need one, None for the others."""
    return [grad if need else None for need, grad in zip(needs, grads, strict=True)]


def saved_number(value: torch.Tensor | float) -> tuple[torch.Tensor | None, float | None]:
    """An operand that is a tensor or a number: what `ctx.save_for_backward` takes of it, what `ctx` keeps itself."""
    return (value, None) if isinstance(value, torch.Tensor) else (None, value)


def _by_level(name: str, operator: Operator, rule: _Rule) -> None:
    """The gradient as a kernel that each level of torch.func calls."""

    def apply(call: Any, o: Any) -> Any:
        followed, nest = rule.followed(o), []  # type: ignore[var-annotated]
        lengths = _lengths(followed)
        output = _Gradient.apply(rule, call, o, lengths, nest, *_flat(followed, lengths))
        if not nest:
            return output
        nested = _nested(output, nest[0])
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
            return apply(call, rule.structure(*operands))

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    hints = get_type_hints(rule.structure)
    kinds = [hints[field] for field in rule.names]
    operator.record = partial(apply, operator.serve)
    if not any(kind == list[torch.Tensor] for kind in kinds):
        operator.followed = rule.places


def _registered(name: str, rule: _Rule) -> None:
    """The same through PyTorch's public way, whose functions torch.func refuses."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        tensors = [isinstance(x, (list, tuple)) and all(isinstance(t, torch.Tensor) for t in x) for x in inputs]
        # what PyTorch takes apart: lists of tensors; other lists are one operand
        ctx.lengths = tuple([len(x) if of_tensors else None for x, of_tensors in zip(inputs, tensors, strict=True)])
        needs = rule.followed(_nested(ctx.needs_input_grad, ctx.lengths))
        rule.save(ctx, rule.structure(*inputs), needs, output)

    def backward(ctx: Any, *grads: Any) -> Any:
        found: list[Any] = [None] * len(ctx.lengths)
        for place, grad in zip(rule.places, rule.backward(ctx, *grads), strict=True):
            found[place] = grad
        return tuple([grad if n is None else _spread(grad, n) for grad, n in zip(found, ctx.lengths, strict=True)])

    torch.library.register_autograd(f"spartan::{name}", backward, setup_context=setup, lib=_LIBRARY)


def _spread(grad: Any, length: int | None) -> list[Any]:
    """The gradients of an operand: one, or one for each tensor of a list of this length."""
    if length is None:
        return [grad]
    return [None] * length if grad is None else list(grad)


def differentiable_once(name: str, of: str) -> None:
    """Let `spartan::name`, the gradient of the public function `of`, refuse to be differentiated in turn."""
    without_gradient(
        name,
        f"spartan.{of} is differentiable once; a derivative of its gradient (create_graph=True and a second"
        " backward, gradgradcheck, hessian) is not implemented",
    )


def without_gradient(name: str, why: str) -> None:
    """Let `spartan::name` refuse to be differentiated, with this error."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(why)

    structure = OPERATORS[name].structure
    tensors = [field for field, kind in get_type_hints(structure).items() if "Tensor" in str(kind)]
    differentiable(name, tensors, lambda ctx, operands, output: None, refuse)


def _recorded(operands: Any) -> bool:
    """Whether autograd must see the call: for a graph, or to refuse the tangents of forward mode."""
    return forward_mode() or (torch.is_grad_enabled() and any_requires_grad(*operands))


def _lengths(nested: Any) -> tuple[int | None, ...] | None:
    """The lengths of the lists in it, None in the place of other entries; None where there are no lists."""
    if _LISTS.isdisjoint(map(type, nested)):
        return None
    return tuple([len(x) if isinstance(x, (list, tuple)) else None for x in nested])


_LISTS = frozenset((list, tuple))


def _flat(nested: Any, lengths: Any) -> Any:
    if lengths is None:
        return nested
    return list(chain.from_iterable([x if isinstance(x, (list, tuple)) else (x,) for x in nested]))


def _nested(flat: Any, lengths: Any) -> Any:
    if lengths is None:
        return flat
    entries = iter(flat)
    return tuple([next(entries) if n is None else list(islice(entries, n)) for n in lengths])
