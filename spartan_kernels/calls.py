"""How an operator is called: through PyTorch's dispatcher, or without it. The one place that decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import torch

from spartan_kernels.operands import as_declared
from spartan_kernels.torch_private import any_requires_grad, watched

__all__ = ["OPERATORS", "Operator"]

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, float, type(None)))  # what may stand where a tensor is declared


class Operator:
    """`torch.ops.spartan.<name>`, without the dispatcher in an eager call on plain tensors.

    The dispatcher takes tens of microseconds for an operator with a Python kernel and lists of tensors. It is left out
    where it would end in that kernel anyway: nothing compiles, traces, transforms or profiles the call.

    Attributes:
        overload: the operator as PyTorch knows it.
        serve: its kernel; takes the operands as `structure`.
        structure: the declaration of its operands.
        returns_list: whether what it returns is one list of tensors.
        record: the kernel with a gradient, for operands that need one: whoever defines the gradient sets it.
        followed: the places of the single tensors that it is a gradient for; empty where any operand may be one.
    """

    def __init__(self, overload: Any, serve: Callable[[Any], Any], structure: Any, returns_list: bool) -> None:
        self.overload, self.serve, self.structure, self.returns_list = overload, serve, structure, returns_list
        self.record: Callable[[Any], Any] | None = None
        self.followed: tuple[int, ...] = ()
        hints = get_type_hints(structure)
        kinds = [hints[field] for field in structure._fields]
        self._lists = tuple([place for place, kind in enumerate(kinds) if kind == list[torch.Tensor]])
        self._tensors = tuple([p for p, kind in enumerate(kinds) if kind in (torch.Tensor, torch.Tensor | None)])

    def __call__(self, o: Any) -> Any:
        """Call it with its operands, a `structure`."""
        if torch.compiler.is_compiling() or watched() or not self._plain(o):
            return self.overload(*as_declared(o))
        if torch.is_grad_enabled() and self._differentiates(o):
            return self.overload(*as_declared(o)) if self.record is None else self.record(o)
        return self.serve(o)

    def _differentiates(self, o: Any) -> bool:
        """Whether a gradient is wanted."""
        if not self.followed:
            return any_requires_grad(*o)
        for place in self.followed:
            operand = o[place]
            if operand is not None and type(operand) is not float and operand.requires_grad:
                return True
        return False

    def _plain(self, o: Any) -> bool:
        """Whether these are plain tensors with data."""
        for place in self._tensors:
            if type(o[place]) not in _PLAIN:
                return False
        for place in self._lists:
            if not _PLAIN.issuperset(map(type, o[place])):
                return False
        first = o[0]
        return not (first[0] if isinstance(first, (list, tuple)) else first).is_meta


OPERATORS: dict[str, Operator] = {}
