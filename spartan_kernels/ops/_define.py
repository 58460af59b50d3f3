"""How an operator enters torch.library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spartan_kernels import dispatch
from spartan_kernels.ops._vmap import Rule, loop

LIBRARY = torch.library.Library("spartan", "DEF")


def define(
    schema: str,
    fake: Callable[..., Any],
    vmap: Callable[[Any], Rule] = loop,
    serve: Callable[..., Any] | None = None,
) -> Any:
    """Define `spartan::<schema>`, whose last argument is the backend's name, and return the callable operator.

    One over a process group has the group's name (empty: this process alone) before it.

    The backend is chosen when the operator runs, not when it is traced: a compiled graph obeys the `backend` block.
    `vmap` makes the operator's rule for `torch.vmap`; operators that write into their arguments have none. `serve`
    runs the operator where its backends do not take its arguments as they are, or are not all there is to choose from.
    """
    name = schema.split("(", 1)[0]
    over_group = "str group, str backend)" in schema

    def call(*arguments: Any) -> Any:
        *operands, backend = arguments
        first = operands[0][0] if isinstance(operands[0], (list, tuple)) else operands[0]
        return dispatch.resolve(name, first, backend, over_group and bool(operands[-1]))(*operands)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, serve or call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spartan::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.spartan, name).default
    if not operator._schema.is_mutable:
        torch.library.register_vmap(f"spartan::{name}", vmap(operator), lib=LIBRARY)
    return operator
