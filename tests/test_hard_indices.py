"""hard_topk with return_indices: the mask and the indices of k entries of each row, on every backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import spartan
from spartan.layers.selection import kept_indices
from spartan_kernels import ops
from spartan_kernels.backends import extension
from spartan_kernels.testing import DISTRIBUTIONS, make_values

pytestmark = [
    pytest.mark.operators("hard_topk_indices_forward"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def expected(row: list[float], k: int) -> tuple[list[int], list[int]]:
    """Indices that are kept and indices that are returned, by Python's stable sort."""
    order = sorted(range(len(row)), key=lambda i: -row[i])[:k]
    return sorted(i for i in order if row[i] > -float("inf")), sorted(order)


def assert_selects(values: Tensor, k: int, target: Any, dim: int = -1) -> None:
    mask, indices = ops.hard_topk(values.to(target.device), k, dim=dim, return_indices=True, backend=target.backend)
    assert (mask.dtype, indices.dtype) == (torch.bool, torch.int64)
    rows, masks, found = (x.cpu().movedim(dim, -1) for x in (values, mask, indices))
    assert masks.shape == rows.shape and found.shape == (*rows.shape[:-1], k)
    flat = (x.reshape(x.shape[:-1].numel(), x.shape[-1]) for x in (rows, masks, found))
    for row, kept, listed in zip(*flat, strict=True):
        assert (kept.nonzero().flatten().tolist(), listed.tolist()) == expected(row.tolist(), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 4, 7, 8, 64, 255, 257, 3001])
def test_lists_what_the_mask_keeps(target: Any, n: int, dtype: torch.dtype) -> None:
    for k in sorted({0, 1, n // 50, n // 3, n // 2, n - 1, n}):
        assert_selects(make_values("normal", (5, n), dtype=dtype, seed=n + k), k, target)


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_ties_go_to_the_lowest_index(target: Any, distribution: str) -> None:
    for n in (12, 300):
        assert_selects(make_values(distribution, (21, n)).mul(2).round(), n // 3, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [4, 10, 200, 1000])
def test_rows_with_too_few_entries_take_the_first_masked_ones(target: Any, n: int, dtype: torch.dtype) -> None:
    values = make_values("normal", (40, n), dtype=dtype, seed=n)
    generator = torch.Generator().manual_seed(n)
    dropped = torch.rand(values.shape, generator=generator) < torch.linspace(0, 1, 40)[:, None]
    for k in (1, n // 2, n):
        assert_selects(values.masked_fill(dropped, -torch.inf), k, target)
    assert_selects(torch.full((3, n), -torch.inf, dtype=dtype), n // 2, target)


def test_long_rows_with_masked_entries(target: Any) -> None:
    """Rows that are solved as lists."""
    values = make_values("normal", (3, 140_000), seed=3).mul(8).round()
    values[1, 5:] = -torch.inf
    values[2, ::3] = -torch.inf
    for k in (11, 70_000):
        assert_selects(values, k, target)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 1, 6), (2, 3, 5, 4)])
def test_every_dim_and_a_view(target: Any, shape: tuple[int, ...]) -> None:
    values = make_values("quantised", shape)
    for dim in range(-len(shape), len(shape)):
        assert_selects(values, (values.shape[dim] + 1) // 2, target, dim)
    base = make_values("normal", (30, 41)).to(target.device)
    for view in (base.T, base[::2, 3:], base[:, :9].expand(30, 9)):
        assert_selects(view, 4, target)


def test_nothing_to_select_from(target: Any) -> None:
    for shape in [(0,), (3, 0), (0, 3)]:
        empty = torch.empty(shape, device=target.device)
        mask, indices = ops.hard_topk(empty, 0, return_indices=True, backend=target.backend)
        assert (mask.shape, indices.shape) == (empty.shape, (*empty.shape[:-1], 0))


def test_same_bits_for_every_thread_count(target: Any, thread_count: None) -> None:
    values = make_values("quantised", (300, 1003), device=target.device)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(ops.hard_topk(values, 77, return_indices=True, backend=target.backend)[1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_opcheck_vmap_and_compile(target: Any) -> None:
    values = make_values("normal", (4, 3, 20), device=target.device)
    torch.library.opcheck(torch.ops.spartan.hard_topk_indices_forward.default, (values[0], 4, target.backend))
    torch.library.opcheck(torch.ops.spartan.hard_topk_indices_forward.default, (values[0], 0, target.backend))

    def select(v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.hard_topk(v, 4, return_indices=True, backend=target.backend)

    def gathered(v: Tensor) -> Tensor:
        return v.gather(-1, select(v)[1]).square()

    for one, other in zip(vmap(select)(values), select(values), strict=True):
        assert torch.equal(one, other)
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(gathered, fullgraph=True, backend="aot_eager")
    results = [call(leaf) for call, leaf in zip((gathered, compiled), leaves, strict=True)]
    assert torch.equal(*results)
    of_values = [torch.autograd.grad(r.sum(), leaf)[0] for r, leaf in zip(results, leaves, strict=True)]
    assert torch.equal(*of_values)
    assert torch.equal(of_values[0], 2 * values * select(values)[0])


def test_layers_select_by_it() -> None:
    scores = make_values("normal", (2, 6, 6), seed=1).masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf)
    found = kept_indices(scores, 3)
    assert found.shape == (2, 6, 3)
    assert [expected(row, 3)[1] for row in scores.flatten(0, 1).tolist()] == found.flatten(0, 1).tolist()
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k must be from 1 to the 6.*got {k}"):
            kept_indices(scores, k)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 1.0}, TypeError, r"budget must be an int.*1\.0"),
        ({"budget": torch.tensor(1)}, TypeError, "budget must be an int.*tensor"),
        ({"budget": True}, TypeError, "budget.*bool|budget.*True"),
        ({"budget": -1}, ValueError, r"budget.*\[0, 3\].*-1"),
        ({"budget": 4}, ValueError, r"budget.*\[0, 3\].*4"),
        ({"costs": 2.0}, ValueError, r"costs must be None.*2\.0"),
        ({"dim": 2}, ValueError, "dim.*2"),
        ({"values": torch.arange(6).reshape(2, 3)}, TypeError, "values.*int64"),
    ],
    ids=lambda x: str(x).replace("\n", "")[:40] if isinstance(x, dict) else "",
)
def test_bad_input_is_named(target: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"values": torch.arange(6.0).reshape(2, 3).to(target.device), "budget": 1, **arguments}
    with pytest.raises(error, match=f"(?is){message}"):
        spartan.hard_topk(**call, return_indices=True, backend=target.backend)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [3, 300, 140_000])
def test_values_that_are_no_numbers_are_refused(target: Any, n: int, bad: float) -> None:
    if target.device != "cpu":
        pytest.skip("on a GPU values are inspected only under checks(True)")
    values = make_values("normal", (4, n))
    values[2, 1] = bad
    with pytest.raises(ValueError, match="values must be finite"):
        ops.hard_topk(values, 2, return_indices=True, backend=target.backend)


@pytest.mark.operators()
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_lists_them(isa: str) -> None:
    if extension.unavailable() is not None or extension.build_info()["instruction_set"] == isa:
        pytest.skip("the tests above ran on it, or the native backend is not here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "native-cpu and lists"]
    environment = {**os.environ, "SPARTAN_ISA": isa}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
