"""How an operator enters torch.library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from spartan_kernels import dispatch
from spartan_kernels.calls import OPERATORS, Operator
from spartan_kernels.operands import as_declared, schema
from spartan_kernels.ops._checked import checked
from spartan_kernels.ops._vmap import Rule, loop
from spartan_kernels.solution import with_values

LIBRARY = torch.library.Library("spartan", "DEF")


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
        chosen = dispatch.requested(o.backend)
        chosen = dispatch.select(name, like.device.type, like.dtype, chosen, over_group and bool(o.group))
        return dispatch.implementation(name, chosen)(o if chosen == "native" else with_values(as_declared(o)))

    run = checked(name, serve or resolved)

    def call(*operands: Any) -> Any:
        return _whole(run(structure(*operands)), operands[0])

    def faked(*operands: Any, **named: Any) -> Any:
        return fake(structure(*operands, **named))

    LIBRARY.define(schema(name, structure, returns, writes), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spartan::{name}", faked, lib=LIBRARY)
    overload = getattr(torch.ops.spartan, name).default
    if not writes:
        torch.library.register_vmap(f"spartan::{name}", vmap(overload, structure), lib=LIBRARY)
    operator = OPERATORS[name] = Operator(overload, run, structure, returns == "Tensor[]")
    return operator


def _whole(returned: Any, like: Any) -> Any:
    """What a kernel returned as the schema wants it: an empty tensor in place of each that was not asked for."""
    if not isinstance(returned, (list, tuple)) or all(entry is not None for entry in returned):
        return returned
    return type(returned)(like.new_empty(0) if entry is None else entry for entry in returned)
