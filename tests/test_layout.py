"""BlockLayout: the index of the active blocks against a dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spartan_kernels import BlockLayout

pytestmark = [pytest.mark.operators("block_layout"), pytest.mark.usefixtures("poisoned_memory")]


def compressed(active: Tensor) -> tuple[list[int], list[int]]:
    """Offsets and indices of a bool matrix by rows, from its definition."""
    offsets, indices = [0], []
    for row in active.tolist():
        indices += [column for column, kept in enumerate(row) if kept]
        offsets.append(len(indices))
    return offsets, indices


def assert_describes(layout: BlockLayout, active: Tensor) -> None:
    blocks = active.numel()
    sides = ((layout.row_offsets, layout.column_indices), (layout.column_offsets, layout.row_indices))
    for (offsets, indices), matrix in zip(sides, (active, active.mT), strict=True):
        expected_offsets, expected = compressed(matrix)
        assert offsets.dtype == indices.dtype == torch.int32
        assert offsets.tolist() == expected_offsets
        assert indices.tolist() == expected + [0] * (blocks - len(expected))
    lengths = [line.tolist().count(True) for matrix in (active, active.mT) for line in matrix]
    sides = lengths[: active.shape[0]], lengths[active.shape[0] :]
    expected_order = [i for side in sides for _, i in sorted((-length, i) for i, length in enumerate(side))]
    assert layout.order.dtype == torch.int32 and layout.order.tolist() == expected_order
    assert torch.equal(layout.mask().cpu(), active)
    assert layout.grid == tuple(active.shape)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40) | st.integers(60, 200),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool]),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
)
def test_any_gate(
    target: Any, rows: int, columns: int, density: float, dtype: torch.dtype, seed: int, masked: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < density
    gate = torch.where(kept, torch.randn(rows, columns, generator=g).abs() + 0.1, 0.0).to(dtype)
    mask = torch.rand(rows, columns, generator=g) < 0.5 if masked else None
    layout = BlockLayout.from_gate(
        gate.to(target.device),
        (rows * 4 - 3, columns * 2 - 1),  # ragged edges: the last block holds one row and one column
        (4, 2),
        None if mask is None else mask.to(target.device),
        backend=target.backend,
    )
    active = kept if mask is None else kept & mask
    assert_describes(layout, active)
    if target.device == "cpu":
        assert layout.density == pytest.approx(int(active.sum()) / active.numel())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_gate_that_threads_share(target: Any, dtype: torch.dtype) -> None:
    """By rows; the entries of a column still lie in the order of its rows."""
    torch.manual_seed(0)
    gate, mask = torch.rand(300, 801) < 0.1, torch.rand(300, 801) < 0.7
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        layout = BlockLayout.from_gate(
            gate.to(target.device, dtype), (300, 801), 1, mask.to(target.device), backend=target.backend
        )
    finally:
        torch.set_num_threads(before)
    assert_describes(layout, gate & mask)


@pytest.mark.parametrize("empty", ["rows", "columns", "everything", "nothing", "all but one"])
def test_what_is_empty(target: Any, empty: str) -> None:
    gate = torch.ones(5, 7)
    if empty == "rows":
        gate[[0, 3, 4]] = 0
    elif empty == "columns":
        gate[:, [0, 5, 6]] = 0
    elif empty == "everything":
        gate[:] = 0
    elif empty == "all but one":
        gate[:] = 0
        gate[3, 2] = 1
    layout = BlockLayout.from_gate(gate.to(target.device), (5, 7), 1, backend=target.backend)
    assert_describes(layout, gate != 0)


def test_nan_is_active_and_negative_zero_is_not(target: Any) -> None:
    gate = torch.tensor([[torch.nan, -0.0], [torch.inf, 1e-45]], device=target.device)
    layout = BlockLayout.from_gate(gate, (2, 2), 1, backend=target.backend)
    assert_describes(layout, torch.tensor([[True, False], [True, True]]))


def test_a_transposed_gate(target: Any) -> None:
    gate = (torch.arange(12.0) % 5 != 0).float().view(4, 3).mT
    assert_describes(BlockLayout.from_gate(gate.to(target.device), (3, 4), 1, backend=target.backend), gate != 0)


def test_frozen_with_a_given_density(target: Any) -> None:
    gate = torch.ones(2, 2, device=target.device)
    layout = BlockLayout.from_gate(gate, (8, 8), 4, density=0.25, backend=target.backend)
    assert layout.density == 0.25 and layout.block_size == (4, 4) and layout.shape == (8, 8)
    with pytest.raises(AttributeError):
        layout.density = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gate": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "gate.*int32"),
        ({"gate": torch.ones(3, 2)}, ValueError, r"gate.*\(2, 2\).*\(3, 2\)"),
        ({"mask": torch.ones(2, 2)}, TypeError, "mask.*float32"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"mask.*\(2, 2\).*\(2, 3\)"),
        ({"block_size": (4, 0)}, ValueError, "block_size.*0"),
        ({"density": 1.5}, ValueError, "density.*1.5"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(target: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"gate": torch.ones(2, 2), "shape": (8, 8), "block_size": 4, "backend": target.backend, **arguments}
    with pytest.raises(error, match=f"(?is){message}"):
        BlockLayout.from_gate(**call)
