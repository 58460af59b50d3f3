"""Every kernel of the Triton backend, watched on the shapes where races are likely.

Tiles with fewer entries than threads, several programs, lists with tensors shorter than a chunk, sums split between
programs, and the last resort of the global solve. The operators' own tests run under the recorder too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton and TRITON_INTERPRET=1", allow_module_level=True)

import spartan
from spartan_kernels import BlockSparseFilter, BlockSparseWeight, ops, tiles
from spartan_kernels.backends import triton as backend
from spartan_kernels.backends.triton import (
    configs,
    global_passes,
    global_solve,
    masked_weight,
    sampled_kernels,
)
from spartan_kernels.backends.triton.tensor_list import TensorList
from spartan_kernels.operands import KeptSoftMass
from spartan_kernels.ops.masked_weight import kept_soft_mass
from spartan_kernels.testing import make_values
from tests.triton_races.declared import DECLARED
from tests.triton_races.recorder import RaceError, recording


def rows(n: int, costs: bool) -> None:
    """Soft and hard top-k by rows, with gradients."""
    values = make_values("normal", (3, n), seed=1).requires_grad_()
    a = (make_values("uniform", (n,), seed=2) + 0.5).requires_grad_() if costs else None
    mask = spartan.soft_topk(values, n / 3, a, beta=2.0, backend="triton")
    torch.autograd.grad((mask * make_values("normal", (3, n), seed=3)).sum(), [values, *([a] if costs else [])])
    ops.hard_topk(values.detach(), n / 3, None if a is None else a.detach(), backend="triton")


def shared_rows(costs: bool) -> None:
    """The same for rows that several programs share, one of them with nothing but ties at its threshold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "MAX_LONG_ROW", 8192)
        patch.setattr(configs, "INTERPRETED_PROGRAMS", 9)
        rows(8500, costs)
        ops.soft_topk(torch.full((3, 8500), 1e13), 3000.0, beta=1e4, backend="triton")


def lists(costs: bool) -> None:
    """One budget over a list: cold and warm solves with ties, and gradients."""
    shapes = [(3,), (50, 60), (0,), (1,), (2500,)]
    values = [make_values("quantised", shape, seed=n) for n, shape in enumerate(shapes)]
    a = [make_values("uniform", v.shape, seed=5) + 0.5 for v in values] if costs else None
    total = sum(v.numel() for v in values)
    state = ops.new_solver_state()
    soft, hard = [torch.empty_like(v) for v in values], [torch.empty(v.shape, dtype=torch.bool) for v in values]
    for _ in range(2):
        ops.solve_masks_(values, total / 4, a, 3.0, soft, hard, state, absolute=True, backend="triton")
    ops.hard_topk_global(values, total / 4, a, backend="triton")
    leaves = [v.clone().requires_grad_() for v in values]
    masks = spartan.soft_topk_global(leaves, total / 4, a, 3.0, backend="triton")
    torch.autograd.grad(sum((m * m).sum() for m in masks), leaves)


def one_rank() -> None:
    """A list over a process group, which has one rank: with ties, soft and hard, and gradients."""
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        try:
            values = [make_values("quantised", shape, seed=1) for shape in ((3,), (50, 60), (0,), (2500,))]
            soft, hard = [torch.empty_like(v) for v in values], [torch.empty_like(v, dtype=torch.bool) for v in values]
            state, group = ops.new_solver_state(), dist.group.WORLD
            ops.solve_masks_(values, 900.0, None, 3.0, soft, hard, state, group=group, backend="triton")
            leaves = [v.clone().requires_grad_() for v in values]
            masks = spartan.soft_topk_global(leaves, 900.0, None, 3.0, group, backend="triton")
            torch.autograd.grad(sum((m * m).sum() for m in masks), leaves)
        finally:
            dist.destroy_process_group()


def last_resort() -> None:
    """A solve whose threshold is moved before the masks are written, so that they miss the budget."""
    values, masks = [make_values("normal", (5000,), seed=1)], [torch.empty(5000)]
    problem = TensorList(values, [])
    solve = global_solve.GlobalSolve(problem.shape, absolute=False, soft=True, hard=False)
    memory, threshold = solve.workspace(), torch.empty(2).double()
    for launch in solve.plan(problem.table(masks), torch.tensor(500.0), torch.tensor(3.0), None, threshold, memory):
        if launch.options.get("FINISH"):
            memory.control[int(global_passes.T)] += 0.1
        launch()
    assert abs(float(masks[0].sum()) - 500) < 1e-3
    assert memory.control[int(global_passes.REWRITE)] > 0


def products(out: int, in_: int, block: tuple[int, int], tokens: int) -> None:
    """A masked product and its gradients, with blocks chosen for them and without; and a packed one."""
    x = make_values("normal", (tokens, in_), seed=1).requires_grad_()
    weight = make_values("normal", (out, in_), seed=2).requires_grad_()
    grid = ops.block_grid((out, in_), block)
    gate = torch.where(make_values("uniform", grid, seed=3) < 0.5, torch.zeros(grid), torch.ones(grid)).requires_grad_()
    bias = make_values("normal", (out,), seed=4)
    for mask in (None, make_values("uniform", grid, seed=5) < 0.5):
        y = spartan.masked_linear(
            x, weight, gate, block, bias, "gelu", forward_mask=mask, backward_mask=mask, backend="triton"
        )
        torch.autograd.grad((y * y).sum(), [x, weight, gate])
    packed = BlockSparseWeight.from_dense(
        weight.detach() * ops.expand_blocks(gate.detach(), weight.shape, block), block
    )
    y = spartan.block_sparse_linear(x, packed, bias, "relu", backend="triton")
    torch.autograd.grad((y * y).sum(), [x])


def in_8_bits() -> None:
    """A packed product with rounded tokens, rows longer than a tile; few programs share sums, many do not."""
    weight = make_values("normal", (70, 2100), seed=2)
    for tokens, tile in ((3, None), (40, tiles.Tile(16, 16, 32, 4))):
        packed = BlockSparseWeight.from_dense(
            weight, (16, 300), make_values("uniform", (5, 7), seed=3) < 0.5
        ).to_float8()
        x = make_values("normal", (tokens, 2100), seed=1)
        with nullcontext() if tile is None else tiles.using(tile):
            spartan.block_sparse_linear(x, packed, make_values("normal", (70,), seed=4), "gelu", backend="triton")


def united() -> None:
    """Lines of small blocks that share programs, the last of them with fewer."""
    x, weight = make_values("normal", (2050, 40), seed=1), make_values("normal", (125, 40), seed=2)
    gate = torch.where(make_values("uniform", (16, 5), seed=3) < 0.5, 0.0, 1.0)
    with tiles.using(tiles.Tile(16, 64, 32, 4)):
        spartan.masked_linear(x, weight, gate, (8, 8), backend="triton")


def convolutions(out: int, in_: int, kernel: tuple[int, int], block: tuple[int, int], stride: int) -> None:
    """A masked convolution and its gradients, of an image in either order of memory."""
    weight = make_values("normal", (out, in_, *kernel), seed=2).requires_grad_()
    grid = (*ops.block_grid((out, in_), block), *kernel)
    gate = torch.where(make_values("uniform", grid, seed=3) < 0.5, torch.zeros(grid), torch.ones(grid)).requires_grad_()
    bias, mask = make_values("normal", (out,), seed=4), make_values("uniform", grid, seed=5) < 0.5
    for layout in (torch.contiguous_format, torch.channels_last):
        x = make_values("normal", (3, in_, 9, 7), seed=1).contiguous(memory_format=layout).requires_grad_()
        y = spartan.masked_conv2d(
            x, weight, gate, block, bias, stride, 1, forward_mask=mask, backward_mask=~mask, backend="triton"
        )
        torch.autograd.grad((y * y).sum(), [x, weight, gate])
        packed = BlockSparseFilter.from_dense(weight.detach(), block, mask)
        y = spartan.block_sparse_conv2d(x, packed, bias, stride, 1, backend="triton")
        torch.autograd.grad((y * y).sum(), [x])


def weights(shape: tuple[int, ...], block: int) -> None:
    """The masked weight, its gradient, also in place, and the coupling between blocks."""
    weight, grad = make_values("normal", shape, seed=1).requires_grad_(), make_values("normal", shape, seed=2)
    scores = ops.block_scores(weight.detach(), block, backend="triton")
    soft = torch.sigmoid(scores - scores.mean())
    masked = ops.masked_weight(weight, soft, soft > 0.5, block, beta=2.0, straight_through=False, backend="triton")
    torch.autograd.grad((masked * grad).sum(), weight)
    ops.masked_weight_coupling(grad, weight.detach(), soft, block, beta=2.0, backend="triton")
    ops.masked_weight_correct_(grad, weight.detach(), soft, 0.5, block, backend="triton")
    theta, hard, beta, cost = weight.detach(), soft > 0.5, torch.tensor(2.0).double(), torch.tensor(1.0).double()
    torch.ops.spartan.masked_weight_backward_(grad, theta, soft, hard, beta, cost, block, block, False, "triton")
    torch.ops.spartan.add_block_signs_(grad, theta, soft, block, block, "triton")
    if block == 1:
        kept_soft_mass(KeptSoftMass(theta, soft, hard, beta, cost, "triton"))


CASES: dict[str, Callable[[], None]] = {
    "short rows": lambda: rows(5, False),
    "rows with costs": lambda: rows(300, True),
    "long rows": lambda: rows(9000, False),
    "long rows with costs": lambda: rows(5000, True),
    "rows shared by programs": lambda: shared_rows(False),
    "rows shared by programs, with costs": lambda: shared_rows(True),
    "lists": lambda: lists(False),
    "lists with costs": lambda: lists(True),
    "a list over ranks": one_rank,
    "the last resort": last_resort,
    "products of small blocks": lambda: products(14, 17, (4, 4), 3),
    "products of large blocks": lambda: products(70, 90, (32, 64), 33),
    "products of lines that share a program": united,
    "products in 8 bits": in_8_bits,
    "products of one entry": lambda: products(3, 4, (1, 1), 1),
    "products of short rows": lambda: products(70, 40, (1, 1), 6),
    "products of rows that warps share": lambda: products(3, 1200, (1, 1), 2),
    "convolutions in small blocks": lambda: convolutions(14, 7, (3, 2), (4, 4), 2),
    "convolutions in large blocks": lambda: convolutions(70, 40, (1, 2), (32, 32), 1),
    "convolutions in single weights": lambda: convolutions(3, 2, (1, 1), (1, 1), 3),
    "weights by entry": lambda: weights((6, 7), 1),
    "weights by block": lambda: weights((17, 30), 4),
    "weights by large block": lambda: weights((100, 90), 64),
    "kernels of a convolution": lambda: weights((8, 6, 3, 3), 2),
}


def kernels() -> set[str]:
    """Names of all kernels of the backend."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(backend.__path__, f"{backend.__name__}.")]
    return {name for module in modules for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}


def test_every_kernel_is_launched_and_sound() -> None:
    with recording(DECLARED) as recorder:
        for name, case in CASES.items():
            try:
                case()
            except RaceError as error:
                raise AssertionError(f"{name}: {error}") from error
    assert recorder.launches.keys() == kernels()


@pytest.mark.parametrize(
    ("module", "case", "kernel"),
    [
        (sampled_kernels, "products of small blocks", "_gate_gradient_kernel"),
        (masked_weight, "weights by block", "_masked_weight_correct_kernel"),
    ],
)
def test_scaling_small_tiles_in_place_without_a_barrier_is_found(
    monkeypatch: pytest.MonkeyPatch, module: Any, case: str, kernel: str
) -> None:
    monkeypatch.setattr(module, "all_loaded", lambda entries: None)
    with recording(), pytest.raises(RaceError, match=rf"\[replicas\] {kernel}"):
        CASES[case]()
