"""How an operator enters torch.library, and how it is called where nothing but its result is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from spartan_kernels import dispatch
from spartan_kernels.operands import schema
from spartan_kernels.ops._checked import checked
from spartan_kernels.ops._vmap import Rule, loop
from spartan_kernels.torch_private import any_requires_grad, watched

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
        structure: the declaration of its operands.
        returns_list: whether what it returns is one list of tensors.
        record: the kernel with a gradient, for operands that need one: whoever defines the gradient sets it.
    """

    def __init__(self, overload: Any, serve: Callable[..., Any], structure: Any, returns_list: bool) -> None:
        self.overload, self.serve, self.structure, self.returns_list = overload, serve, structure, returns_list
        self.record: Callable[..., Any] | None = None

    def __call__(self, *operands: Any) -> Any:
        """Call it; the last operand is the backend's name."""
        if torch.compiler.is_compiling() or not _eager(operands):
            return self.overload(*operands)
        if torch.is_grad_enabled() and any_requires_grad(*operands):
            return self.overload(*operands) if self.record is None else self.record(*operands)
        return self.serve(*operands)


OPERATORS: dict[str, Operator] = {}


def _eager(operands: tuple[Any, ...]) -> bool:
    """Whether these are plain tensors and numbers, in a call that nothing watches, changes or keeps."""
    if watched() or not _OPERANDS.issuperset(map(type, operands)):
        return False
    for operand in operands:
        if isinstance(operand, (list, tuple)) and not _SINGLE.issuperset(map(type, operand)):
            return False
    first = operands[0]
    first = first[0] if isinstance(first, (list, tuple)) else first
    return not first.is_meta


def define(
    name: str,
    structure: Any,
    returns: str,
    fake: Callable[[Any], Any],
    vmap: Callable[[Any, Any], Rule] = loop,
    serve: Callable[[Any], Any] | None = None,
    writes: Sequence[str] = (),
) -> Operator:
    """Define `spartan::<name>` and return the callable operator.

    The backend is chosen when the operator runs, not when it is traced: a compiled graph obeys the `backend` block.

    The operator is private: it trusts its operands, which the public functions have checked. SPARTAN_CHECK_OPERANDS=1
    has it check them again (`_checked.py`).

    Args:
        name: of the operator, and of the functions of the backends that compute it.
        structure: the declaration of its operands (`spartan_kernels.operands`), of which `fake`, `serve` and the
            backends take one.
        returns: what its schema says after the arrow.
        fake: what it returns, without the numbers.
        vmap: makes its rule for `torch.vmap`; operators that write into their operands have none.
        serve: runs it where its backends do not take its operands as they are, or are not all there is to choose from.
        writes: the operands that it writes to.
    """
    first, over_group = structure._fields[0], "group" in structure._fields

    def resolved(o: Any) -> Any:
        like = getattr(o, first)
        like = like[0] if isinstance(like, (list, tuple)) else like
        return dispatch.resolve(name, like, o.backend, over_group and bool(o.group))(o)

    run = checked(name, serve or resolved)

    def call(*operands: Any) -> Any:
        return run(structure(*operands))

    def faked(*operands: Any, **named: Any) -> Any:
        return fake(structure(*operands, **named))

    LIBRARY.define(schema(name, structure, returns, writes), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spartan::{name}", faked, lib=LIBRARY)
    overload = getattr(torch.ops.spartan, name).default
    if not writes:
        torch.library.register_vmap(f"spartan::{name}", vmap(overload, structure), lib=LIBRARY)
    operator = OPERATORS[name] = Operator(overload, call, structure, returns == "Tensor[]")
    return operator
