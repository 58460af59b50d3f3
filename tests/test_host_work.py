"""What a call asks of a GPU besides its kernels: launches, allocations, copies, waits; and that replays are faithful.

On a stand-in (bench/stand_in.py): counts, no times.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from bench import host, stand_in
from spartan_kernels import ops
from spartan_kernels.backends.triton import tensor_list
from spartan_kernels.backends.triton.tensor_list import TensorList

ALLOCATIONS = {"empty", "empty_like", "zeros", "zeros_like", "ones_like", "new_empty", "new_zeros", "new_ones", "full"}
WAITS = {
    "item",
    "tolist",
    "__int__",
    "__float__",
    "__bool__",
    "__index__",
    "nonzero",
    "equal",
    "cpu",
    "numpy",
    "unique",
}
# data of the host that becomes a tensor: on a GPU a copy from memory that is not pinned, which waits
FROM_HOST = {"tensor", "as_tensor", "from_numpy", "to", "copy_"}


@contextmanager
def asked() -> Iterator[Counter[str]]:
    """Counts the functions and methods of PyTorch with these names that are called from Python."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in ALLOCATIONS | WAITS | FROM_HOST:
            for holder in (torch, torch.Tensor):
                if hasattr(holder, name):
                    stack.enter_context(mock.patch.object(holder, name, counting(name, getattr(holder, name))))
        yield counts


def of(counts: Counter[str], names: set[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name in names}


@pytest.fixture
def gpu() -> Iterator[stand_in.Launches]:
    with stand_in.gpu() as counted:
        yield counted


CASES: dict[str, tuple[Callable[[], host.Call], int, int]] = {
    # call, launches, allocations
    "solve of 2": (lambda: host.solve(2), 8, 5),
    "solve of 54": (lambda: host.solve(54), 8, 5),
    "global of 2": (lambda: host.soft_topk_global(2), 7, 7),
    "global of 54": (lambda: host.soft_topk_global(54), 7, 59),
    "linear": (lambda: host.masked_linear(False), 4, 9),
    "linear, layout": (lambda: host.masked_linear(True), 2, 3),
    "linear, layout, backward": (lambda: host.masked_linear(True, True), 5, 7),
    "single weights": (host.single_weights, 1, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_launches_allocations_and_no_wait(case: str, gpu: stand_in.Launches) -> None:
    make, launched, allocated = CASES[case]
    call = make()
    call()
    call()
    gpu.clear()
    with asked() as counts:
        call()
    assert sum(gpu.values()) == launched, dict(gpu)
    assert not of(counts, WAITS | FROM_HOST), counts
    assert sum(of(counts, ALLOCATIONS).values()) == allocated, counts


def test_a_wait_is_seen() -> None:
    with asked() as counts:
        int(torch.ones(3)[0])
        torch.tensor([1.0]).tolist()
    assert of(counts, WAITS) == {"__int__": 1, "tolist": 1}
    assert of(counts, FROM_HOST) == {"tensor": 1}


@pytest.mark.parametrize("case", CASES)
def test_a_replay_launches_with_what_triton_would(case: str, gpu: stand_in.Launches) -> None:
    """Every argument of the second call, the pointers aside, is one of the first; pointers are those of tensors."""
    call = CASES[case][0]()
    first, again = arguments_of(gpu, call), arguments_of(gpu, call)
    third = arguments_of(gpu, call)
    assert [name for name, _ in first] == [name for name, _ in again] == [name for name, _ in third]
    for (_, one), (_, two), (_, three) in zip(first, again, third, strict=True):
        assert len(one) == len(two) == len(three)
        for a, b, c in zip(one, two, three, strict=True):
            if isinstance(a, torch.Tensor):
                assert type(b) in (int, torch.Tensor) and type(c) is int
            else:
                assert a == b == c and type(a) is type(b) is type(c)


def arguments_of(gpu: stand_in.Launches, call: host.Call) -> list[tuple[str, tuple[Any, ...]]]:
    gpu.seen = []
    call()
    seen, gpu.seen = gpu.seen, None
    return seen


def test_a_replay_follows_the_tensors(gpu: stand_in.Launches) -> None:
    """The same problem elsewhere in memory: pointers are the new ones, in the places of the old."""
    values = [[torch.randn(300), torch.randn(50)] for _ in range(3)]
    masks = [([torch.empty_like(v) for v in vs], [torch.empty(v.shape, dtype=torch.bool) for v in vs]) for vs in values]
    budget, beta = (torch.tensor(v, dtype=torch.float64) for v in (50.0, 3.0))
    states = [ops.new_solver_state() for _ in values]
    for vs, (soft, hard), state in zip(values, masks, states, strict=True):
        seen = arguments_of(gpu, lambda a=(vs, soft, hard, state): ops.solve_masks_(a[0], budget, None, beta, *a[1:]))
        (start,) = (arguments for name, arguments in seen if name == "start_kernel")
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in start[:4]]
        assert addresses[1:] == [budget.data_ptr(), beta.data_ptr(), state.data_ptr()]
        table = TensorList(vs, []).table(soft, hard)
        assert addresses[0] == table.words.data_ptr()
        pointers = [[t.data_ptr() for t in tensors] for tensors in (vs, soft, hard)]
        assert table.words[:-1, [0, 6, 7]].T.tolist() == pointers


def test_pointers_that_are_not_aligned_take_other_kernels(gpu: stand_in.Launches) -> None:
    memory = torch.zeros(4, dtype=torch.float64)
    kernels = []
    for budget, beta in (
        (memory[0], memory[2]),
        (memory[1], memory[2]),
        (memory[0], memory[2]),
        (memory[1], memory[2]),
    ):
        before = sum(launch_caches())
        values = [torch.randn(300)]
        ops.soft_topk_global(values, budget, beta=beta)
        kernels.append(sum(launch_caches()) - before)
    assert kernels[0] > 0 and kernels[1] > 0 and kernels[2:] == [0, 0]


def launch_caches() -> list[int]:
    """Kernels compiled so far, for each function."""
    functions = {
        id(f): f for module in stand_in._modules() for f in vars(module).values() if hasattr(f, "device_caches")
    }
    return [len(caches[0]) for f in functions.values() for caches in f.device_caches.values()]


def test_tables_are_few_and_threads_may_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that solve many lists at once: never more tables than are kept, each of its own list."""
    monkeypatch.setattr(tensor_list, "_tables", tensor_list._Tables(8))
    lists = [[torch.randn(40 + n)] for n in range(40)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(300):
                values = lists[(7 * step + seed) % len(lists)]
                table = TensorList(values, []).table(values)
                if table.words[0, 0] != values[0].data_ptr() or table.words[0, 4] != values[0].numel():
                    wrong.append(values)
        except Exception as error:  # a dict that changes while it is walked
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(tensor_list._tables.kept) <= 8


def test_graphs_of_the_same_list_share_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured again and again, a step takes no more pinned memory; another list gets a source of its own."""
    staging = tensor_list._Staging
    monkeypatch.setattr(staging, "free", torch.zeros(64, dtype=torch.int64))
    monkeypatch.setattr(staging, "sources", {})
    one, other = torch.arange(18).view(2, 9), torch.arange(18).view(2, 9) + 1
    first = staging.take(one)
    assert all(staging.take(one.clone()) is first for _ in range(100))
    second = staging.take(other)
    assert torch.equal(first, one) and torch.equal(second, other)
    assert staging.free is not None and staging.free.numel() == 64 - 36
    with pytest.raises(RuntimeError, match="once before it is captured"):
        staging.take(torch.arange(36).view(4, 9))
