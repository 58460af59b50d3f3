"""Host time of an operator's call, without a GPU: `python -m bench.host`.

The time of the calling thread from the public function to the driver's launch, which a stand-in counts (stand_in.py):
argument checks, autograd, dispatch, plans, allocations and Triton's own launcher. Tensors lie on the CPU; what a GPU's
allocator, its driver and the other thread of its backward pass take is not in it.

Every operator of the native CPU backend is called on a small problem: without a gradient, with one, and forward and
backward. Beside each stands the time in its kernels; the rest is overhead. PyTorch's linear layer stands by: of
its forward and backward PyTorch's engine takes most, as of ours.

Each case runs in rounds with the others; the fastest round counts, in time of the thread: others may use the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

import spartan
from bench import machine
from spartan_kernels import BlockLayout, BlockSparseWeight, new_solver_state, solve_masks_
from spartan_kernels.backends import extension

SAVED = Path(__file__).resolve().parent / "results" / "host.json"
_ROUNDS, _CALLS = 60, 15
# microseconds of the calling thread that a call may take on a machine that nobody else uses
LIMITS = {
    "solve_masks_, 2 tensors": 150,
    "solve_masks_, 54 tensors": 150,
    "soft_topk_global, 2 tensors": 150,
    "soft_topk_global, 54 tensors": 150,
    "masked_linear, layout": 40,
    "masked_linear, layout, forward and backward": 120,
}
Call = Callable[[], Any]


@dataclass(frozen=True)
class HostTime:
    """One call: microseconds of its thread, how many additions of four floats that is, and kernels launched.

    `kernels`: microseconds of it in the extension's own functions, on a CPU.
    """

    case: str
    microseconds: float
    additions: float
    launches: int
    limit: int | None
    kernels: float | None = None


def solve(tensors: int) -> Call:
    """A training step's masks, by magnitude, over weights of 64 x 32."""
    weights = [torch.randn(64, 32) for _ in range(tensors)]
    soft = [torch.empty_like(w) for w in weights]
    hard = [torch.empty(w.shape, dtype=torch.bool) for w in weights]
    state = new_solver_state()
    return lambda: solve_masks_(weights, 500.0, None, 5.0, soft, hard, state, absolute=True)


def soft_topk_global(tensors: int, gradient: bool = False) -> Call:
    """Soft masks that autograd follows."""
    values = [torch.randn(64, 32, requires_grad=gradient) for _ in range(tensors)]
    grads = [torch.ones(64, 32) for _ in values]
    if gradient:
        return lambda: torch.autograd.grad(spartan.soft_topk_global(values, 500.0, None, 5.0), values, grads)
    return lambda: spartan.soft_topk_global(values, 500.0, None, 5.0)


def masked_linear(layout: bool, gradient: bool = False, side: int = 64, tokens: int = 8) -> Call:
    """A layer of 32 x 32 blocks; the gradient is that of x and of the active blocks of the weight."""
    x, weight = (torch.randn(n, side, requires_grad=gradient) for n in (tokens, side))
    gate = torch.eye(side // 32)
    known = BlockLayout.from_gate(gate, (side, side), (32, 32), density=32 / side) if layout else None
    grad = torch.ones(tokens, side)

    def forward() -> torch.Tensor:
        return spartan.masked_linear(x, weight, gate, layout=known, backward_layout=known)

    return (lambda: torch.autograd.grad(forward(), (x, weight), grad)) if gradient else forward


def single_weights(side: int = 64, tokens: int = 1) -> Call:
    """A product of few tokens with packed single weights, a tenth of them kept."""
    weight = torch.where(torch.rand(side, side) < 0.1, torch.randn(side, side), 0.0)
    packed, x = BlockSparseWeight.from_dense(weight, 1), torch.randn(tokens, side)
    return lambda: spartan.block_sparse_linear(x, packed)


def cpu_operators() -> dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]:
    """Each operator on a small problem: a function, and the tensors that it is differentiable in."""
    x, weight, gate = torch.randn(8, 64), torch.randn(64, 64), torch.eye(2)
    layout = BlockLayout.from_gate(gate, (64, 64), 32)
    packed = BlockSparseWeight.from_dense(weight, 32, gate != 0)
    a, b, soft, hard = torch.randn(64, 8), torch.randn(8, 64), torch.rand(2, 2), torch.ones(2, 2, dtype=torch.bool)
    return {
        "torch linear": (functional.linear, (x, weight)),
        "masked_linear": (lambda x, w: spartan.masked_linear(x, w, gate), (x, weight)),
        "masked_linear, layout": (
            lambda x, w: spartan.masked_linear(x, w, gate, layout=layout, backward_layout=layout),
            (x, weight),
        ),
        "block_sparse_linear": (lambda x: spartan.block_sparse_linear(x, packed), (x,)),
        "sampled_matmul": (lambda a, b: spartan.sampled_matmul(a, b, None, 32, layout=layout), (a, b)),
        "soft_topk": (lambda v: spartan.soft_topk(v, 8.0, beta=3.0), (x,)),
        "hard_topk": (lambda v: spartan.hard_topk(v, 8.0), ()),
        "masked_weight": (lambda w: spartan.masked_weight(w, soft, hard, 32, beta=3.0), (weight,)),
    }


def gpu_cases() -> dict[str, Call]:
    """What runs on the stand-in."""
    return {
        "solve_masks_, 2 tensors": solve(2),
        "solve_masks_, 54 tensors": solve(54),
        "soft_topk_global, 2 tensors": soft_topk_global(2),
        "soft_topk_global, 54 tensors": soft_topk_global(54),
        "soft_topk_global, 2 tensors, forward and backward": soft_topk_global(2, True),
        "soft_topk_global, 54 tensors, forward and backward": soft_topk_global(54, True),
        "masked_linear": masked_linear(False),
        "masked_linear, layout": masked_linear(True),
        "masked_linear, layout, forward and backward": masked_linear(True, True),
        "block_sparse_linear, single weights": single_weights(),
    }


def cpu_cases() -> dict[str, Call]:
    """Small calls of the native CPU backend, and PyTorch's."""
    cases: dict[str, Call] = {f"solve_masks_ on the CPU, {n} tensors": solve(n) for n in (2, 54)}
    for name, (function, inputs) in cpu_operators().items():
        cases[f"{name} on the CPU"] = partial(function, *(inputs or (torch.randn(8, 64),)))
        if inputs:
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            grad = torch.ones_like(function(*inputs))
            cases[f"{name} on the CPU, with a gradient"] = partial(function, *leaves)
            cases[f"{name} on the CPU, forward and backward"] = partial(_both, function, leaves, grad)
    return cases


def _both(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor], grad: torch.Tensor) -> Any:
    return torch.autograd.grad(function(*leaves), leaves, grad)


class _Clock:
    """Stands in for the extension's functions for a CPU and counts the nanoseconds in them."""

    def __init__(self, functions: Any) -> None:
        self.functions, self.spent = functions, 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.functions, name)
        if isinstance(function, type):  # what describes an operand is not a kernel
            return function

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return function(*arguments)
            finally:
                self.spent += time.perf_counter_ns() - begin

        setattr(self, name, timed)
        return timed


def kernel_time(call: Call) -> float:
    """Microseconds of a call in the extension's functions for a CPU; the fastest of many counts."""
    native = extension.native
    clock = _Clock(native.cpu)
    spent = []
    with mock.patch.object(extension, "native", SimpleNamespace(cpu=clock, **_other_parts(native))):
        for _ in range(_ROUNDS * _CALLS):
            clock.spent = 0
            call()
            spent.append(clock.spent)
    return min(spent) / 1e3


def _other_parts(native: Any) -> dict[str, Any]:
    return {name: getattr(native, name) for name in dir(native) if name != "cpu" and not name.startswith("__")}


def measure(cases: dict[str, Call], launches: Any = None) -> Iterator[HostTime]:
    """The fastest round of each."""
    a = torch.ones(4)
    cases = {**cases, "": lambda: a + a}
    best = dict.fromkeys(cases, float("inf"))
    counts = dict.fromkeys(cases, 0)
    for case, call in cases.items():
        for _ in range(3):
            call()
        if launches is not None:
            launches.clear()
            call()
            counts[case] = sum(launches.values())
    for _ in range(_ROUNDS):
        for case, call in cases.items():
            call()
            begin = time.thread_time_ns()
            for _ in range(_CALLS):
                call()
            best[case] = min(best[case], (time.thread_time_ns() - begin) / _CALLS / 1e3)
    one = best.pop("")
    for case, found in best.items():
        yield HostTime(case, round(found, 1), round(found / one, 1), counts[case], LIMITS.get(case))


def main() -> None:
    """Measure, print and, with --save, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name}")
    save = parser.parse_args().save
    torch.set_num_threads(1)
    from bench import stand_in

    with stand_in.gpu() as launches:
        results = list(measure(gpu_cases(), launches))
    cases = cpu_cases()
    ours = {name: kernel_time(call) for name, call in cases.items() if not name.startswith("torch")}
    results += [replace(found, kernels=ours.get(found.case)) for found in measure(cases)]
    print(f"{'':58s} {'µs':>8s} {'adds':>7s} {'launches':>9s} {'limit':>6s} {'kernels':>8s}")
    for r in results:
        kernels = "" if r.kernels is None else f"{r.kernels:8.1f}"
        print(f"{r.case:58s} {r.microseconds:8.1f} {r.additions:7.1f} {r.launches:9d} {r.limit or '':>6} {kernels:>8s}")
    if save:
        import triton

        content = {
            "machine": machine.describe("cpu") | {"triton": triton.__version__, "reasons_to_distrust": machine.busy()}
        }
        SAVED.write_text(json.dumps(content | {"results": [asdict(r) for r in results]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
