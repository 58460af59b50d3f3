"""How an operator enters torch.library, and how it is called where nothing but its result is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from spartan_kernels import dispatch
from spartan_kernels.ops._checked import checked
from spartan_kernels.ops._vmap import Rule, loop

LIBRARY = torch.library.Library("spartan", "DEF")
_SINGLE = frozenset((torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)))
_OPERANDS = _SINGLE | {list, tuple}


class Operator:
    """`torch.ops.spartan.<name>`, without the dispatcher in an eager call on plain tensors.

    The dispatcher takes tens of microseconds for an operator with a Python kernel and lists of tensors. It is left out
    where it would end in that kernel anyway: nothing compiles, traces, transforms or profiles the call.

    Attributes:
        overload: the operator as PyTorch knows it.
        serve: its kernel.
        record: the kernel with a gradient, for operands that need one: whoever defines the gradient sets it.
    """

    def __init__(self, overload: Any, serve: Callable[..., Any]) -> None:
        self.overload, self.serve = overload, serve
        self.record: Callable[..., Any] | None = None

    def __call__(self, *operands: Any) -> Any:
        """Call it; the last operand is the backend's name."""
        if torch.compiler.is_compiling() or not _eager(operands):
            return self.overload(*operands)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
            return self.overload(*operands) if self.record is None else self.record(*operands)
        return self.serve(*operands)


OPERATORS: dict[str, Operator] = {}


def _eager(operands: tuple[Any, ...]) -> bool:
    """Whether these are plain tensors and numbers, in a call that nothing watches, changes or keeps."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    if not _OPERANDS.issuperset(map(type, operands)):
        return False
    for operand in operands:
        if isinstance(operand, (list, tuple)) and not _SINGLE.issuperset(map(type, operand)):
            return False
    first = operands[0]
    first = first[0] if isinstance(first, (list, tuple)) else first
    return not first.is_meta


def define(
    schema: str,
    fake: Callable[..., Any],
    vmap: Callable[[Any], Rule] = loop,
    serve: Callable[..., Any] | None = None,
) -> Operator:
    """Define `spartan::<schema>`, whose last argument is the backend's name, and return the callable operator.

    One over a process group has the group's name (empty: this process alone) before it.

    The backend is chosen when the operator runs, not when it is traced: a compiled graph obeys the `backend` block.
    `vmap` makes the operator's rule for `torch.vmap`; operators that write into their arguments have none. `serve`
    runs the operator where its backends do not take its arguments as they are, or are not all there is to choose from.

    The operator is private: it trusts its operands, which the public functions have checked. SPARTAN_CHECK_OPERANDS=1
    has it check them again (`_checked.py`).
    """
    name = schema.split("(", 1)[0]
    over_group = "str group, str backend)" in schema

    def call(*arguments: Any) -> Any:
        *operands, backend = arguments
        first = operands[0][0] if isinstance(operands[0], (list, tuple)) else operands[0]
        return dispatch.resolve(name, first, backend, over_group and bool(operands[-1]))(*operands)

    kernel = checked(name, serve or call)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spartan::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.spartan, name).default
    if not overload._schema.is_mutable:
        torch.library.register_vmap(f"spartan::{name}", vmap(overload), lib=LIBRARY)
    operator = OPERATORS[name] = Operator(overload, kernel)
    return operator
