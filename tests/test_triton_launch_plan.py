"""What the Triton backend launches: bytes for each value against the limits of the method, and reads that happen.

The plan is the list that the launcher runs. That a launch marked "cold" or "rare" does nothing otherwise is counted by
the kernels themselves, here in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton.language as tl

from bench import gpu_plan
from spartan_kernels import ops
from spartan_kernels.backends.triton import (
    global_solve,
    global_steps,
    launches,
    masked_matmul,
    product_launches,
    soft_topk_rows,
    tensor_list,
)
from spartan_kernels.backends.triton.global_gradient import GlobalGradient
from spartan_kernels.backends.triton.global_solve import GlobalSolve
from spartan_kernels.backends.triton.product_plan import ProductPlan, SampledPlan
from spartan_kernels.backends.triton.tensor_list import TensorList, list_shape
from spartan_kernels.operands import MaskedLinear, SoftTopk, SoftTopkBackward
from spartan_kernels.testing import make_values, oracle_hard_topk
from spartan_kernels.tiles import MANY_TOKENS, default_tile

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
SCALAR = torch.ones((), dtype=torch.float64)


def plan_of(values: list[torch.Tensor], costs: list[torch.Tensor], soft: bool, hard: bool) -> list[launches.Launch]:
    problem = TensorList(values, costs)
    table = problem.table(values, values)
    solve = GlobalSolve(problem.shape, True, soft, hard)
    return solve.plan(table, SCALAR, SCALAR, ops.new_solver_state(), torch.ones(2).double(), solve.workspace())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
def test_bytes_for_each_value(dtype: torch.dtype, size: int) -> None:
    """Warm: one survey and the write, 12 bytes in float32; cold: a survey more, 16; a hard mask adds its one byte."""
    values = [torch.empty(s, dtype=dtype) for s in [(300, 7), (0, 3), (5000,)]]
    n = sum(v.numel() for v in values)
    for soft, hard in [(True, False), (True, True)]:
        plan = plan_of(values, [], soft, hard)
        assert launches.bytes_moved(plan, "always") == (3 * size + hard) * n
        assert launches.bytes_moved(plan, "always", "cold") == (4 * size + hard) * n
    plan = plan_of(values, [], False, True)
    assert launches.bytes_moved(plan, "always", "cold") == (3 * size + 1) * n


def test_a_cost_for_each_tensor_is_not_read_as_an_array() -> None:
    values = [torch.empty(4000), torch.empty(500, 2)]
    numbers = [torch.ones(()), torch.ones(())]
    assert launches.bytes_moved(plan_of(values, numbers, True, True), "always") == 13 * 5000
    arrays = [torch.ones(()), torch.ones(500, 2)]
    # the sum of the costs, then one more array in the survey and in the write
    assert launches.bytes_moved(plan_of(values, arrays, True, True), "always") == 13 * 5000 + 3 * 4 * 1000


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
def test_bytes_of_gradients(dtype: torch.dtype, size: int) -> None:
    """20 in float32: values and gradient twice, the result once."""
    values = [torch.empty(300, 7, dtype=dtype)]
    problem = TensorList(values, [])
    table = problem.table(values, values)
    two = torch.ones(2).double()
    plan = GlobalGradient(problem.shape, False, table.aligned).plan(table, two, SCALAR, two, two)
    assert launches.bytes_moved(plan, "always", "cold", "rare") == 5 * size * 2100


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
def test_bytes_of_rows(dtype: torch.dtype, size: int) -> None:
    """Rows in registers move no more than their limit: 8 in float32, 12 backwards."""
    values, budget = torch.empty(50, 24, dtype=dtype), torch.ones(50).double()
    threshold = torch.ones(50, 2).double()
    forward = soft_topk_rows.forward_launch(SoftTopk(values, budget, None, SCALAR), values, threshold)
    assert launches.bytes_moved([forward], "always") == 2 * size * values.numel()
    grads = values, values.new_empty(0), budget, budget
    backward = soft_topk_rows.backward_launch(SoftTopkBackward(values, values, threshold, None, SCALAR, False), grads)
    assert launches.bytes_moved([backward], "always") == 3 * size * values.numel()


@pytest.mark.parametrize("programs", [264, 608])
@pytest.mark.parametrize("costs", [False, True])
def test_memory_besides_the_masks(programs: int, costs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 4 MiB for any number of values, on a large GPU too."""
    list_shape.cache_clear()
    monkeypatch.setattr(tensor_list, "program_count", lambda device, chunks: programs)
    values = [torch.empty(25_600_000)]
    problem = TensorList(values, [torch.ones(())] if costs else [])
    solve = GlobalSolve(problem.shape, True, True, True)
    assert solve.workspace_bytes + problem.table().words.nbytes < 4 << 20
    assert sum(part.nbytes for part in set(solve.workspace())) <= solve.workspace_bytes
    list_shape.cache_clear()


@interpreted
@pytest.mark.parametrize(
    ("rows", "n", "budget", "beta"),
    [(512, 4, 2.0, 1.0), (512, 4, 2.0, 10.0), (512, 4, 2.0, 1e3), (8, 4096, 409.6, 10.0), (8, 1024, 512.0, 4.0)],
)
def test_one_round_solves_normal_rows(
    rows: int, n: int, budget: float, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the counts of rows assume (`bench.gpu_counts`); what it leaves goes on in `more_rounds`."""

    def more_rounds(*arguments: object) -> None:
        raise AssertionError("rows are left")

    values, k = make_values("normal", (rows, n)), torch.full((rows,), budget, dtype=torch.float64)
    exact = ops.soft_topk(values.double(), k, beta=beta, backend="reference")
    monkeypatch.setattr(soft_topk_rows, "more_rounds", more_rounds)
    mask = ops.soft_topk(values, k, beta=beta, backend="triton")
    torch.testing.assert_close(mask.double(), exact, rtol=1e-5, atol=1e-6)
    with pytest.raises(Exception, match="rows are left"):
        ops.soft_topk(values, 0.3 * n, beta=30.0 if n == 4 else 300.0, backend="triton")


@interpreted
@pytest.mark.parametrize("capacity", [None, 64])
def test_reads_of_a_training_run(capacity: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cold solve surveys its values at most twice, a warm one once; too many candidates cost reads, not exactness."""
    if capacity:
        monkeypatch.setattr(global_solve, "candidate_capacity", lambda programs, has_costs: capacity)
    state, reads = ops.new_solver_state(), []
    base, drift = (make_values("normal", (40_001,), seed=i) for i in range(2))
    for step in range(5):
        values = [base + 0.001 * step * drift]
        k, beta = 4000.0 - 20 * step, 5.0 + 0.1 * step
        soft, hard = [torch.full_like(values[0], torch.nan)], [torch.ones(40_001, dtype=torch.bool)]
        problem = TensorList(values, [])
        solve = GlobalSolve(problem.shape, True, True, True)
        table = problem.table(soft, hard)
        solve.run(table, k * SCALAR, beta * SCALAR, state)
        counts = global_solve.last_solve()
        assert counts is not None
        reads.append(counts.passes + counts.rewrites + counts.trials)
        assert abs(float(soft[0].double().sum()) - k) <= 1e-6 * k
        assert torch.equal(hard[0], oracle_hard_topk(values[0].abs(), k))
    if capacity is None:
        assert reads[0] <= 2
        assert reads[2:] == [1, 1, 1]


@interpreted
@pytest.mark.parametrize("tolerance", [None, 1e-9])
def test_counts_of_the_last_solve(tolerance: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that misses the budget, as bias between two ways of adding would make it, shows as a second write."""
    if tolerance:
        monkeypatch.setattr(global_steps, "TOLERANCE", tl.constexpr(tolerance))
    (mask,) = ops.soft_topk_global([make_values("normal", (3000,))], 300.0, beta=5.0, backend="triton")
    counts = global_solve.last_solve()
    assert counts is not None and 1 <= counts.passes <= 4
    assert (counts.rewrites, counts.trials > 0) == (int(tolerance is not None), tolerance is not None)
    assert abs(float(mask.double().sum()) - 300) <= 1e-6 * 300


@pytest.mark.parametrize("rows", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize(("kind", "width"), [("bfloat16", 2), ("tf32", 4), ("float32", 4)])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_traffic_of_a_product_is_the_bound_of_its_blocks(architecture: int, kind: str, width: int, rows: int) -> None:
    """An element of x serves as many outputs as its block has rows, up to a tile: that many operations for a byte."""
    tokens, columns, active = 8192, 64, 500
    tile = default_tile(architecture, tokens, rows, kind)
    plan = ProductPlan(tokens, 4096, 4096, rows, columns, width, tile).fitted(scaled=False)
    traffic, tile = plan.traffic(active), plan.tile
    served = min(rows, tile.BLOCK_N)
    assert traffic.flops == traffic.x_bytes * 2 // width * served
    assert traffic.flops == traffic.weight_bytes * 2 // width * tile.BLOCK_M
    assert traffic.y_bytes == tokens * 4096 * width
    if width == 2:
        most = 512 if rows == 64 else 256  # where the sums leave the registers room
        assert served == min(rows, 128) and tile.BLOCK_M == (most if architecture >= 90 else 128)


@pytest.mark.parametrize(("in_", "out"), gpu_plan.SHAPES)
@pytest.mark.parametrize("block", gpu_plan.BLOCKS, ids=str)
def test_bytes_of_the_plans_that_are_reported(block: tuple[int, int], in_: int, out: int) -> None:
    """Counted program by program, as the kernel walks them: what each reads from L2, and each group from memory."""
    (rows, columns), tokens = block, gpu_plan.TOKENS
    (row,) = (
        r
        for r in gpu_plan.plan_rows()
        if (r.shape, r.block, r.direction) == (f"{in_} to {out}", f"{rows} x {columns}", "forward")
    )
    block_m, block_n, _ = (int(side) for side in row.tile.split(" x "))
    active = round(gpu_plan.DENSITY * (out // rows) * (in_ // columns))
    token_tiles = tokens // block_m
    if block_n <= rows:  # each active block, once for each tile of tokens
        from_l2 = token_tiles * (rows // block_n) * active * columns * (block_m + block_n) * 2
    else:  # columns of x that any line of a program reads, once for all of them; the weights as before
        gate = make_values("uniform", (out // block_n, block_n // rows, in_ // columns), seed=3) < gpu_plan.DENSITY
        walked = int(gate.any(1).sum())
        from_l2 = token_tiles * (walked * columns * block_m + active * columns * rows) * 2
        assert row.full == pytest.approx(int(gate.sum()) / (walked * block_n // rows), rel=0.02)
        assert row.l2_megabytes == pytest.approx(from_l2 / 1e6, rel=0.02)
        from_l2 = 1e6 * row.l2_megabytes
    assert row.l2_megabytes == round(from_l2 / 1e6, 1)
    group = (16 << 20) // (block_m * in_ * 2)
    weights = -(-(tokens // block_m) // group) * active * rows * columns
    assert row.memory_megabytes == round((tokens * (in_ + out) + weights) * 2 / 1e6, 1)
    assert row.plan == pytest.approx(min(800.0, 2 * tokens * active * rows * columns / from_l2 * 5.5), abs=0.06)
    assert 0.66 <= row.part <= (1.3 if row.united else 1)
    # beforehand each weight is read and written once, in bfloat16 at 3.35 TB/s, by a launch of 1.5 microseconds
    assert row.scaling_microseconds == round(active * rows * columns * 4 / 3.35e6 + 1.5 * (1 + row.united), 1)


@pytest.mark.parametrize("block", gpu_plan.BLOCKS, ids=str)
def test_bytes_of_a_product_in_8_bits(block: tuple[int, int]) -> None:
    """One for each entry of x and weights, two for y; before, x is read in bfloat16 and written in float8."""
    (rows, columns), tokens, in_, out = block, gpu_plan.TOKENS, 4096, 16384
    (row,) = (
        r
        for r in gpu_plan.plan_rows()
        if (r.shape, r.block, r.direction) == (f"{in_} to {out}", f"{rows} x {columns}", gpu_plan.FLOAT8_FORWARD)
    )
    block_m, block_n, block_k = (int(side) for side in row.tile.split(" x "))
    assert (block_n, block_k) == (rows, 128) and block_m * block_n <= 1 << 14  # sums, and those of a step beside them
    active = round(gpu_plan.DENSITY * (out // rows) * (in_ // columns))
    from_l2 = tokens // block_m * active * columns * (block_m + block_n)
    assert row.l2_megabytes == round(from_l2 / 1e6, 1)
    weights = -(-(tokens // block_m) // min(16, (16 << 20) // (block_m * in_))) * active * rows * columns
    assert row.memory_megabytes == round((tokens * in_ + weights + 2 * tokens * out) / 1e6, 1)
    assert row.plan == pytest.approx(min(1600.0, 2 * tokens * active * rows * columns / from_l2 * 5.5), abs=0.06)
    assert row.bound == min(1600.0, 2 * rows * 5.5) and row.part >= 0.5
    assert row.scaling_microseconds == round(tokens * in_ * 3 / 3.35e6 + 1.5, 1)


@pytest.mark.parametrize("block", gpu_plan.BLOCKS, ids=str)
def test_bytes_of_a_weights_gradient(block: tuple[int, int]) -> None:
    """Counted program by program, for a random gate: the columns of x of its blocks, and the rows of dz once."""
    (rows, columns), tokens, in_, out = block, gpu_plan.TOKENS, 4096, 16384
    gate = make_values("uniform", (out // rows, in_ // columns), seed=3) < gpu_plan.DENSITY
    plan = SampledPlan((out // rows, in_ // columns), rows, columns, "bfloat16", 90)
    programs = [min(n, plan.blocks) for count in gate.sum(1).tolist() for n in range(count, 0, -plan.blocks)]
    from_l2 = sum(tokens * (blocks * columns + rows) * 2 for blocks in programs)
    density = float(gate.double().mean())
    traffic = plan.traffic(tokens, density)
    assert traffic.x_bytes + traffic.weight_bytes == pytest.approx(from_l2, rel=0.05)
    assert plan.programs(density) == pytest.approx(len(programs), rel=0.05)
    assert len(programs) >= 100  # enough for a GPU
    if rows == columns <= 32:
        assert traffic.flops / (traffic.x_bytes + traffic.weight_bytes) >= 0.85 * rows


@pytest.mark.parametrize("tokens", [2000, 3000])
def test_a_product_asks_for_what_its_tile_says(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch has one program for each tile of tokens and outputs: as the traffic counts them.

    With many tokens weights are multiplied by their gates first, and the product has none.
    """
    launched: list[tuple[str, tuple[int, ...], dict[str, object]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *args, **options: launched.append((self.name, grid, options))

    for name in ("_scaled_kernel", "_product_kernel", "_join_kernel"):
        monkeypatch.setattr(product_launches.kernels, name, Recorder(name))
    gate = torch.ones(6, 4)
    sizes = (7, 24, 5, 24, 10)
    layout = [torch.zeros(n, dtype=torch.int32) for n in sizes]
    x, weight = torch.zeros(tokens, 256), torch.zeros(1536, 256)
    masked_matmul.masked_linear_forward(MaskedLinear(x, weight, gate, layout, [], None, "", 256, 64, save=False))
    names = [name for name, _, _ in launched]
    assert names == (["_scaled_kernel"] if tokens >= MANY_TOKENS else []) + ["_product_kernel"]
    _, grid, options = launched[-1]
    assert options["HAS_GATE"] == (tokens < MANY_TOKENS)
    tile = default_tile(0, tokens, 256, "float32")
    assert grid == (-(-tokens // tile.BLOCK_M) * 6 * (256 // tile.BLOCK_N), 1)
    assert {key: options[key] for key in tile.options()} == tile.options()
