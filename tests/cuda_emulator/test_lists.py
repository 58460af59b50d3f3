"""The CUDA list kernels on the emulator: bytes moved, and the ways through a solve that small lists never take.

Run by tests/test_cuda_emulated.py, which builds the emulated extension and loads it with the plugin beside this file.
"""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from spartan_kernels import new_solver_state, ops, solve_masks_
from spartan_kernels.backends import extension
from spartan_kernels.backends.cuda import lists, soft_topk
from spartan_kernels.operands import SoftTopkGlobal, SoftTopkGlobalBackward
from spartan_kernels.testing import assert_within_error_budget, oracle_soft_topk, plain_soft_topk

pytestmark = pytest.mark.skipif(not os.environ.get("SPARTAN_EMULATED"), reason="needs the emulated CUDA extension")

N = 80_000  # more than one thread block solves alone
BETA = torch.tensor(12.0, dtype=torch.float64)


def taken(*names: str) -> tuple[int, ...]:
    """The emulator's counters of these names since the last call."""
    library = ctypes.CDLL(os.environ["SPARTAN_EMULATED"])
    counters = [ctypes.c_uint64.in_dll(library, f"emulator_{name}") for name in names]
    found = tuple(counter.value for counter in counters)
    for counter in counters:
        counter.value = 0
    return found


def moved() -> tuple[int, ...]:
    """Bytes read and written past L1 since the last call."""
    return taken("bytes_read", "bytes_written")


def budget_of(k: float) -> torch.Tensor:
    return torch.tensor(float(k), dtype=torch.float64)


def solve(values: torch.Tensor, k: float, state: torch.Tensor, costs: torch.Tensor | None = None) -> list[torch.Tensor]:
    soft, hard = torch.full_like(values, torch.nan), torch.ones(values.shape, dtype=torch.bool)
    a = None if costs is None else [costs]
    solve_masks_([values], budget_of(k), a, BETA, [soft], [hard], state, absolute=True, backend="cuda")
    return [soft, hard]


def expected_hard(values: list[torch.Tensor], k: float, costs: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    return ops.hard_topk_global([v.abs() for v in values], budget_of(k), costs, backend="reference")


# methods.md, section 1, in bytes for each float32 entry: one read and one write; warm; cold; gradient
LIMIT, WARM, COLD, BACKWARD = 8, 12, 16, 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_a_solve_moves_what_its_launch_plan_says(dtype: torch.dtype, density: float) -> None:
    share, mask = dtype.itemsize / 4, 1
    plan = lists.launch_plan(dtype)
    assert sum((launch.read + launch.written) * launch.cold for launch in plan) <= COLD * share + mask
    assert sum((launch.read + launch.written) * launch.warm for launch in plan) <= WARM * share + mask
    values, state = torch.randn(N), new_solver_state("cpu")
    for step in range(4):
        moved()
        solve(values.to(dtype), density * N, state)
        passes = [launch.warm if step else launch.cold for launch in plan]
        read = sum(launch.read * times for launch, times in zip(plan, passes, strict=True))
        written = sum(launch.written * times for launch, times in zip(plan, passes, strict=True))
        for found, bytes_each in zip(moved(), (read, written), strict=True):
            assert found <= 1.001 * bytes_each * N and found >= 0.99 * (LIMIT / 2 * share) * N
            assert found >= 0.99 * bytes_each * N or step == 0  # a sample can be good enough for one pass less
        values += 1e-3 * torch.randn(N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_gradient_moves_what_its_launch_plan_says(dtype: torch.dtype) -> None:
    plan = lists.backward_launch_plan(dtype)
    assert sum(launch.read + launch.written for launch in plan) == BACKWARD * dtype.itemsize / 4
    values = torch.randn(N).to(dtype).requires_grad_()
    (mask,) = ops.soft_topk_global([values], budget_of(0.1 * N), None, BETA, backend="cuda")
    _, threshold = soft_topk.soft_topk_global_forward(SoftTopkGlobal([values], budget_of(0.1 * N), [], BETA))
    moved()
    soft_topk.soft_topk_global_backward(
        SoftTopkGlobalBackward([torch.randn_like(mask)], [values], threshold, [], BETA, False)
    )
    for found, each in zip(moved(), (sum(p.read for p in plan), sum(p.written for p in plan)), strict=True):
        assert 0.99 * each * N <= found <= 1.001 * each * N


@pytest.mark.parametrize("tensors", [1, 40, 41, 90])
@pytest.mark.parametrize("priced", [False, True], ids=["no costs", "costs"])
def test_a_call_launches_what_its_plan_says(priced: bool, tensors: int) -> None:
    """The plan is that of up to 40 tensors; each 40 more take a launch that brings them."""
    values = [torch.randn(200) for _ in range(tensors)]
    costs = [torch.rand(200) + 0.5 for _ in values] if priced else None
    k, state, more = budget_of(20.0 * tensors), new_solver_state("cpu"), (tensors - 1) // 40
    soft, hard = [torch.empty(200) for _ in values], [torch.empty(200, dtype=torch.bool) for _ in values]
    kernels = [launch.kernel for launch in lists.launch_plan(torch.float32, cost_arrays=priced)]
    assert kernels == (["send", "costs"] if priced else []) + ["start", "search", "write", "again"]
    for _ in ("cold", "warm"):
        taken("launches")
        solve_masks_(values, k, costs, BETA, soft, hard, state, backend="cuda")
        assert taken("launches") == (len(kernels) + more,)
        for found, wanted in zip(hard, ops.hard_topk_global(values, k, costs, backend="reference"), strict=True):
            assert torch.equal(found, wanted)
    _, threshold = soft_topk.soft_topk_global_forward(SoftTopkGlobal(values, k, costs or [], BETA))
    gradient = SoftTopkGlobalBackward(soft, values, threshold, costs or [], BETA, False)
    taken("launches")
    soft_topk.soft_topk_global_backward(gradient)
    assert taken("launches") == (len(lists.backward_launch_plan(torch.float32)) + more,)


@pytest.mark.parametrize("offset", [0, 3])
def test_lists_at_any_address(offset: int) -> None:
    sizes = (N, 1, 0, 4097, 10_003, 7, 0)
    values = [torch.randn(n + offset)[offset:] for n in sizes]
    costs = [torch.rand(n + offset)[offset:] + 0.5 for n in sizes]
    k = 0.2 * sum(float(c.double().sum()) for c in costs)
    soft, hard = [torch.full((n,), torch.nan) for n in sizes], [torch.ones(n, dtype=torch.bool) for n in sizes]
    state = new_solver_state("cpu")
    for _ in ("cold", "warm"):
        solve_masks_(values, budget_of(k), costs, BETA, soft, hard, state, absolute=True, backend="cuda")
        for found, wanted in zip(hard, expected_hard(values, k, costs), strict=True):
            assert torch.equal(found, wanted)
        magnitudes, a = torch.cat(values).abs(), torch.cat(costs)
        exact = oracle_soft_topk(magnitudes, budget_of(k), a, float(BETA))
        plain = plain_soft_topk(magnitudes, budget_of(k), a, float(BETA))
        assert_within_error_budget(torch.cat(soft), exact, plain, 1e-7)


@pytest.mark.parametrize("density", [0.9, 0.01])
@pytest.mark.parametrize("levels", [2, 1 << 12])
@pytest.mark.parametrize("priced", [False, True])
def test_more_ties_than_are_sorted_go_to_the_lowest_index(density: float, levels: int, priced: bool) -> None:
    values = torch.randint(1, levels + 1, (N,)).float()
    costs = 2.0 ** torch.randint(-1, 2, (N,)) if priced else None
    values = values if costs is None else values * costs
    total = float(N if costs is None else costs.double().sum())
    wanted = None if costs is None else [costs]
    state = new_solver_state("cpu")
    for k in (density * total, density * total, 0.5 * density * total):  # cold, warm, and a range that misses
        _, hard = solve(values, k, state, costs)
        assert torch.equal(hard, expected_hard([values], k, wanted)[0])


def test_the_hard_threshold_is_exact_however_wrong_the_state() -> None:
    values = torch.randn(N) * torch.logspace(-4, 2, N)
    for guess in (0.0, -1e30, 1e30, 1e-38, torch.nan, torch.inf):
        state = new_solver_state("cpu")
        state[:6] = torch.tensor([guess, guess, guess, guess, 3.0, 1e-3], dtype=torch.float64)
        soft, hard = solve(values, 0.07 * N, state)
        assert torch.equal(hard, expected_hard([values], 0.07 * N)[0])
        assert abs(float(soft.double().sum()) / (0.07 * N) - 1) <= 1e-6


def test_counts_of_the_last_solve() -> None:
    """Cold at most two surveys, then one each; the masks are written once."""
    values, state, counts = torch.randn(N), new_solver_state("cpu"), []
    for _ in range(3):
        solve(values, 0.1 * N, state)
        counts.append(lists.last_solve())
    passes, rewrites, trials = zip(*counts, strict=True)
    assert passes[0] <= 2 and passes[1:] == (1, 1)
    assert rewrites == trials == (0, 0, 0)


def test_the_same_bits_twice() -> None:
    values, costs = torch.randn(N), torch.rand(N) + 0.1
    runs = []
    for _ in range(2):
        state = new_solver_state("cpu")
        runs.append([*solve(values, 0.1 * N, state, costs), state])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_leaves_no_plausible_mask(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "check_list", lambda *_: None)  # as on a GPU, where the host does not look
    values = torch.randn(N)
    values[73_457] = bad
    for k in (0.1 * N, float(N)):
        soft, hard = solve(values, k, new_solver_state("cpu"))
        assert bool(soft.isnan().all()) and not bool(hard.any())


def test_little_memory_beside_the_masks() -> None:
    for sizes in ((2**31 + 5,), (1_000_000,) * 1000, (3,)):
        words = torch.tensor([[0, 0, 0, n, 0, 0, 0] for n in sizes], dtype=torch.int64)
        assert extension.native.cuda.global_workspace_bytes(words.data_ptr(), len(sizes)) < 4 << 20
