"""How an operator enters torch.library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spartan_kernels import dispatch

LIBRARY = torch.library.Library("spartan", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> Any:
    """Define `spartan::<schema>`, whose last argument is the backend's name, and return the callable operator.

    The backend is chosen when the operator runs, not when it is traced: a compiled graph obeys the `backend` block.
    """
    name = schema.split("(", 1)[0]

    def call(*arguments: Any) -> Any:
        *operands, backend = arguments
        first = operands[0][0] if isinstance(operands[0], list | tuple) else operands[0]
        return dispatch.resolve(name, first, backend)(*operands)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spartan::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.spartan, name).default
