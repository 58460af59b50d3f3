"""The operands of every operator, declared once: a field for each argument of its schema, in their order.

The schema has a tensor where one number is wanted (a budget, beta, a scale, one cost), for it may be on a GPU or need a
gradient. A call without PyTorch's dispatcher may pass a float there, which the native backend takes as it is;
`as_declared` makes a tensor of it for whoever else serves.

`schema` makes an operator's schema of its declaration. Backends and fake implementations take one such structure. A
backend that calls another operator's function may leave out the fields with defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

__all__ = [
    "AddBlockSigns",
    "BlockLayoutOf",
    "BlockScores",
    "Float8Linear",
    "HardTopk",
    "HardTopkGlobal",
    "HardTopkIndices",
    "KeptSoftMass",
    "MaskedConv",
    "MaskedConvBackward",
    "MaskedLinear",
    "MaskedLinearBackward",
    "MaskedWeight",
    "MaskedWeightBackward",
    "MaskedWeightCorrection",
    "MaskedWeightCoupling",
    "PackedConv",
    "PackedConvBackward",
    "PackedLinear",
    "PackedLinearBackward",
    "SampledMatmul",
    "SoftTopk",
    "SoftTopkBackward",
    "SoftTopkGlobal",
    "SoftTopkGlobalBackward",
    "SolveMasks",
    "as_declared",
    "schema",
]


class SoftTopk(NamedTuple):
    """By rows: values [rows, n]; budget float64 [rows]; costs None, [], [n] or [rows, n]; beta float64 []."""

    values: Tensor
    budget: Tensor
    costs: Tensor | None
    beta: Tensor
    backend: str = ""


class SoftTopkBackward(NamedTuple):
    """`threshold` float64 [rows, 2]: (centre c, shift d) of the solution m = sigmoid(beta (values/costs - c) + d)."""

    grad: Tensor
    values: Tensor
    threshold: Tensor
    costs: Tensor | None
    beta: Tensor
    cost_grad: bool
    backend: str = ""


class SoftTopkGlobal(NamedTuple):
    """A list under one budget []: costs empty, or one tensor, [] or shaped like its values, for each."""

    values: list[Tensor]
    budget: Tensor
    costs: list[Tensor]
    beta: Tensor
    group: str = ""
    backend: str = ""


class SoftTopkGlobalBackward(NamedTuple):
    """`threshold` float64 [2]."""

    grads: list[Tensor]
    values: list[Tensor]
    threshold: Tensor
    costs: list[Tensor]
    beta: Tensor
    cost_grad: bool
    group: str = ""
    backend: str = ""


class SolveMasks(NamedTuple):
    """`block_sizes`: rows and columns of each tensor in turn; empty where values are scores already.

    No `soft`: the soft masks are not written, and their solution (c, d) goes to the last two numbers of the state.
    """

    values: list[Tensor]
    budget: Tensor
    costs: list[Tensor]
    beta: Tensor
    absolute: bool
    block_sizes: list[int]
    soft: list[Tensor]
    hard: list[Tensor]
    state: Tensor
    group: str = ""
    backend: str = ""


class HardTopk(NamedTuple):
    """As `SoftTopk`."""

    values: Tensor
    budget: Tensor
    costs: Tensor | None
    backend: str = ""


class HardTopkIndices(NamedTuple):
    """k entries of each row of values [rows, n], at unit costs."""

    values: Tensor
    k: int
    backend: str = ""


class HardTopkGlobal(NamedTuple):
    """As `SoftTopkGlobal`; `absolute`: by magnitude."""

    values: list[Tensor]
    budget: Tensor
    costs: list[Tensor]
    absolute: bool
    group: str = ""
    backend: str = ""


class MaskedWeight(NamedTuple):
    """weight [out, in, ...]; soft, hard: one entry for each block of (rows, columns), None for ones; costs [] or so.

    Where each weight is a block soft may be (c, d), float64 [2]: the solution m = sigmoid(beta (|theta| / a - c) + d).
    """

    weight: Tensor
    soft: Tensor | None
    hard: Tensor | None
    beta: Tensor
    costs: Tensor
    rows: int
    columns: int
    straight_through: bool
    backend: str = ""


class MaskedWeightBackward(NamedTuple):
    """`grad` of the masked weight."""

    grad: Tensor
    weight: Tensor
    soft: Tensor | None
    hard: Tensor | None
    beta: Tensor
    costs: Tensor
    rows: int
    columns: int
    straight_through: bool
    backend: str = ""


class MaskedWeightCoupling(NamedTuple):
    """`grad`: the final gradient of the weight."""

    grad: Tensor
    weight: Tensor
    soft: Tensor
    beta: Tensor
    costs: Tensor
    rows: int
    columns: int
    backend: str = ""


class MaskedWeightCorrection(NamedTuple):
    """grad_i -= sign(theta_i) s_b scale; `beta` and `costs` are those of a solution."""

    grad: Tensor
    weight: Tensor
    soft: Tensor
    scale: Tensor
    beta: Tensor
    costs: Tensor
    rows: int
    columns: int
    backend: str = ""


class KeptSoftMass(NamedTuple):
    """Where each weight is a block: sum of h m and sum of h; soft and hard as for `MaskedWeight`."""

    weight: Tensor
    soft: Tensor
    hard: Tensor
    beta: Tensor
    costs: Tensor
    backend: str = ""


class AddBlockSigns(NamedTuple):
    """grad_i += sign(theta_i) pull_b."""

    grad: Tensor
    weight: Tensor
    pull: Tensor
    rows: int
    columns: int
    backend: str = ""


class BlockScores(NamedTuple):
    """A weight and its blocks."""

    weight: Tensor
    rows: int
    columns: int
    backend: str = ""


class BlockLayoutOf(NamedTuple):
    """The blocks whose gate and mask (None: ones) are not zero."""

    gate: Tensor
    mask: Tensor | None
    backend: str = ""


class MaskedLinear(NamedTuple):
    """`backward_layout` and `slope` are there for the gradient alone; `density`: active blocks / blocks, or -1.

    No `layout`: the blocks whose gate is not zero. A bool gate scales nothing.
    """

    x: Tensor
    weight: Tensor
    gate: Tensor
    layout: list[Tensor]
    backward_layout: list[Tensor]
    bias: Tensor | None
    activation: str
    rows: int
    columns: int
    save: bool
    density: float = -1.0
    slope: Tensor | None = None
    backend: str = ""


class MaskedLinearBackward(NamedTuple):
    """`needs`: of x, weight, gate, bias. Only the gradients of weight and gate read x. No `layout`: as above."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    gate: Tensor
    layout: list[Tensor]
    backward_layout: list[Tensor]
    saved: Tensor
    activation: str
    rows: int
    columns: int
    needs: list[bool]
    density: float = -1.0
    slope: Tensor | None = None
    backend: str = ""


class SampledMatmul(NamedTuple):
    """a b on the blocks of the layout."""

    a: Tensor
    b: Tensor
    layout: list[Tensor]
    rows: int
    columns: int
    backend: str = ""


class PackedLinear(NamedTuple):
    """values [n, rows, columns]: the blocks of the weight, which has `out` rows."""

    x: Tensor
    values: Tensor
    layout: list[Tensor]
    positions: Tensor
    bias: Tensor | None
    activation: str
    out: int
    save: bool
    backend: str = ""


class PackedLinearBackward(NamedTuple):
    """`needs`: of x, values, bias."""

    grad: Tensor
    x: Tensor
    values: Tensor
    layout: list[Tensor]
    positions: Tensor
    saved: Tensor
    activation: str
    needs: list[bool]
    backend: str = ""


class Float8Linear(NamedTuple):
    """As `PackedLinear`, of values in torch.float8_e4m3fn; scales float32 [out, 1], of each row of the weight."""

    x: Tensor
    values: Tensor
    scales: Tensor
    layout: list[Tensor]
    positions: Tensor
    bias: Tensor | None
    activation: str
    out: int
    backend: str = ""


class MaskedConv(NamedTuple):
    """Masks have one entry for each block of (rows, columns) of each kernel position, as the gate."""

    x: Tensor
    weight: Tensor
    gate: Tensor
    forward_mask: Tensor | None
    backward_mask: Tensor | None
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    rows: int
    columns: int
    backend: str = ""


class MaskedConvBackward(NamedTuple):
    """`needs`: of x, weight, gate, bias."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    gate: Tensor
    forward_mask: Tensor | None
    backward_mask: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    rows: int
    columns: int
    needs: list[bool]
    backend: str = ""


class PackedConv(NamedTuple):
    """values, layout and positions are those of a `BlockSparseFilter`'s matrix, which has `out` rows.

    kernel: its height and width.
    """

    x: Tensor
    values: Tensor
    layout: list[Tensor]
    positions: Tensor
    bias: Tensor | None
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    out: int
    backend: str = ""


class PackedConvBackward(NamedTuple):
    """`needs`: of x, values, bias."""

    grad: Tensor
    x: Tensor
    values: Tensor
    layout: list[Tensor]
    positions: Tensor
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    needs: list[bool]
    backend: str = ""


_NUMBERS = frozenset(("budget", "beta", "costs", "scale"))


def as_declared(o: Any) -> Any:
    """The operands with tensors where there are floats in their place, as the schema has them."""
    if float not in map(type, o):
        return o
    first = o[0][0] if isinstance(o[0], (list, tuple)) else o[0]
    made = {}
    for name in _NUMBERS.intersection(o._fields):
        value = getattr(o, name)
        if isinstance(value, float):
            made[name] = torch.full((), value, dtype=torch.float64, device=first.device)
    if "budget" in made and isinstance(o, (SoftTopk, HardTopk)):
        made["budget"] = made["budget"].expand(o.values.shape[0])  # one for each row
    return o._replace(**made)


_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[int]: "int[]",
    list[bool]: "bool[]",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
}


def schema(name: str, operands: Any, returns: str, writes: Sequence[str] = ()) -> str:
    """The schema of the operator `name`, which writes to the operands named, as `torch.library` takes it."""
    fields = []
    for field, kind in get_type_hints(operands).items():
        text = _TYPES[kind]
        if field in writes:
            text = text.replace("Tensor", f"Tensor({'abc'[writes.index(field)]}!)")
        fields.append(f"{text} {field}")
    return f"{name}({', '.join(fields)}) -> {returns}"
