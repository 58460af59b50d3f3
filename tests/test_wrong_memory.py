"""Operands that would have a kernel read or write memory that is not theirs are refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import spartan
from spartan.nn import BlockSparseLinear
from spartan_kernels import BlockLayout, BlockSparseWeight, info, new_solver_state, ops, solve_masks_

INDEX = ("row_offsets", "column_indices", "column_offsets", "row_indices", "order", "positions")


def packed_layer() -> BlockSparseLinear:
    torch.manual_seed(0)
    weight = torch.randn(40, 48) * (torch.rand(5, 3) < 0.5).repeat_interleave(8, 0).repeat_interleave(16, 1)
    return BlockSparseLinear(BlockSparseWeight.from_dense(weight, (8, 16)))


@pytest.mark.parametrize("name", INDEX)
@pytest.mark.parametrize(
    "change", [lambda t: t - 1, lambda t: t + 1000, lambda t: t.flip(0)], ids=["-1", "+1000", "flip"]
)
def test_a_state_with_a_wrong_index_is_not_loaded(name: str, change: Any) -> None:
    layer = packed_layer()
    state = layer.state_dict()
    state[name] = change(state[name])
    with pytest.raises(RuntimeError, match=r"row_offsets|column_indices|changed since it was made"):
        layer.load_state_dict(state)


def test_its_own_state_is_loaded() -> None:
    layer = packed_layer()
    layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    assert torch.isfinite(layer(torch.randn(3, 48))).all()


@pytest.mark.skipif(not info()["native"]["available"], reason="only kernels read what an index says unchecked")
@pytest.mark.usefixtures("unchecked_operands")
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("entry", [-1, 1000, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", [name for name in INDEX if name != "order"])
def test_an_index_written_over_after_loading_is_refused(name: str, entry: int, tokens: int) -> None:
    layer = packed_layer()
    buffer = getattr(layer, name)
    buffer[0] = entry
    x = torch.randn(tokens, 48, requires_grad=True)
    with pytest.raises(ValueError, match="layout must be the index of the weight's blocks"):
        layer(x).sum().backward()


@pytest.mark.parametrize("shape", [(0,), (0, 8, 16), (1, 8, 16), (7, 0, 0), (7, 128)], ids=str)
def test_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    layer = packed_layer()
    assert layer.values.shape[0] not in shape[:1]
    layer.values = torch.nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"values must have shape \(\d+, 8, 16\)"):
        layer(torch.randn(3, 48))


@pytest.mark.parametrize("name", INDEX)
@pytest.mark.parametrize(
    "change",
    [lambda t: t[:-1], lambda t: t.long(), lambda t: t[None], lambda t: t.to("meta"), lambda t: t.repeat(2)[::2]],
    ids=["short", "int64", "two dimensions", "another device", "strided"],
)
def test_an_index_of_the_wrong_kind_is_refused(name: str, change: Any) -> None:
    packed = packed_layer().packed
    with pytest.raises(ValueError, match=r"must be contiguous torch.int32 of shape|column_indices|values must"):
        if name == "positions":
            dataclasses.replace(packed, positions=change(packed.positions))
        else:
            dataclasses.replace(packed.layout, **{name: change(getattr(packed.layout, name))})


def test_masks_on_another_device_than_the_weight_are_refused() -> None:
    weight, soft, hard = torch.randn(6, 4), torch.rand(6, 4), torch.rand(6, 4) > 0.5
    far = {"soft": soft.to("meta"), "hard": hard.to("meta")}
    for name, tensor in far.items():
        masks = {"soft": soft, "hard": hard} | {name: tensor}
        with pytest.raises(ValueError, match=f"{name} must be on cpu, as weight; got meta"):
            spartan.masked_weight(weight, **masks)
    with pytest.raises(ValueError, match="soft must be on cpu"):
        ops.masked_weight_coupling(weight, weight, far["soft"], beta=1.0)
    with pytest.raises(ValueError, match="grad must be on cpu"):
        ops.masked_weight_coupling(weight.to("meta"), weight, soft, beta=1.0)
    with pytest.raises(ValueError, match="soft must be on cpu"):
        ops.masked_weight_correct_(weight, weight, far["soft"], 1.0)


@pytest.mark.parametrize("name", ["soft", "hard", "state"])
def test_a_solve_into_another_device_is_refused(name: str) -> None:
    values = torch.randn(50)
    places: dict[str, Any] = {"soft": values.clone(), "hard": values > 0, "state": new_solver_state()}
    places[name] = places[name].to("meta")
    with pytest.raises(ValueError, match=rf"{name}.* must be on cpu, as values; got meta"):
        solve_masks_([values], 10.0, None, 1.0, [places["soft"]], [places["hard"]], places["state"])


@pytest.mark.parametrize("block", [(2**40, 3), (10**8, 64), (5, 2**40), 10**9], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_block_beyond_the_matrix_costs_no_more_than_the_matrix(block: Any, backend: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(10, 7), torch.randn(4, 7)
    gate = torch.rand(ops.block_scores(weight, block).shape) + 0.5
    rows, columns = (
        min(b, s) for b, s in zip((block, block) if isinstance(block, int) else block, (10, 7), strict=True)
    )
    expected = spartan.masked_linear(x, weight, gate, (rows, columns), backend="reference")
    y = spartan.masked_linear(x, weight, gate, block, backend=backend)
    torch.testing.assert_close(y, expected)
    layout = BlockLayout.from_gate(gate, weight.shape, block)
    torch.testing.assert_close(spartan.masked_linear(x, weight, gate, block, layout=layout, backend=backend), expected)
    masked = spartan.masked_weight(weight, gate, gate > 0, block, backend=backend)
    torch.testing.assert_close(x @ masked.T, expected)
    packed = BlockSparseWeight.from_dense(weight, block)
    assert packed.values.numel() <= 4 * weight.numel()
    torch.testing.assert_close(spartan.block_sparse_linear(x, packed, backend=backend), x @ weight.T)
    soft, hard = torch.empty_like(gate), torch.empty(gate.shape, dtype=torch.bool)
    solve_masks_([weight], 0.5 * weight.numel(), [float(rows * columns)], 1.0, [soft], [hard], new_solver_state(),
                 block_sizes=[block], backend=backend)  # fmt: skip
    assert torch.isfinite(soft).all()
