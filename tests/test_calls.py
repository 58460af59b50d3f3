"""Calls that leave PyTorch's dispatcher out, and small ones that leave the other threads out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import spartan
from spartan_kernels import info, ops, probes
from spartan_kernels.operands import HardTopk, MaskedWeight, SoftTopk, as_declared
from spartan_kernels.ops import OPERATORS

needs_native = pytest.mark.skipif(not info()["native"]["available"], reason="measures the native backend")


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were called through the dispatcher, in order."""
    names: list[str] = []
    for name, operator in OPERATORS.items():

        def call(*operands: Any, _name: str = name, _overload: Any = operator.overload) -> Any:
            names.append(_name)
            return _overload(*operands)

        monkeypatch.setattr(operator, "overload", call)
    return names


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


def _solve(values: torch.Tensor) -> torch.Tensor:
    return spartan.soft_topk(values, 2.0, beta=3.0)


def _profiled(values: torch.Tensor) -> torch.Tensor:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mask = _solve(values)
    assert any(event.key == "spartan::soft_topk_forward" for event in profile.key_averages())
    return mask


def _moded(values: torch.Tensor) -> torch.Tensor:
    with _Watching():
        return _solve(values)


def _dual(values: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return _solve(values)


WATCHED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a dispatch mode": _moded,
    "vmap": lambda v: torch.vmap(_solve)(v[None])[0],
    "torch.func.grad": lambda v: torch.func.grad(lambda v: _solve(v).sum())(v),
    "forward mode": _dual,
    "the profiler": _profiled,
    "a subclass": lambda v: _solve(v.as_subclass(_Subclass)),
    "torch.jit.trace": lambda v: torch.jit.trace(_solve, v, check_trace=False)(v),
}


def test_an_eager_call_on_plain_tensors_leaves_the_dispatcher_out(dispatched: list[str]) -> None:
    values = torch.randn(3, 5)
    _solve(values)
    _solve(values.requires_grad_()).sum().backward()
    assert dispatched == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("watcher", WATCHED)
def test_what_watches_or_changes_calls_sees_them(watcher: str, dispatched: list[str]) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found = WATCHED[watcher](values)
    assert "soft_topk_forward" in dispatched
    expected = torch.zeros(3, 5) if watcher == "torch.func.grad" else _solve(values)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("probe", probes.probes(), ids=lambda probe: probe.operator)
def test_both_ways_compute_the_same_bits(probe: probes.Probe) -> None:
    moved = probes.inputs_on(probes.make_inputs(), "cpu")
    direct = probe.call(moved, "auto")
    with _Watching():
        dispatched = probe.call(moved, "auto")
    for one, other in zip(probes._flat(direct), probes._flat(dispatched), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_numbers_and_tensors_give_the_same_bits(backend: str) -> None:
    values, weight = torch.randn(4, 9), torch.randn(6, 5)
    soft, hard = torch.rand(6, 5), torch.rand(6, 5) > 0.5
    tensor = torch.tensor(2.5, dtype=torch.float64)

    def found(number: Any) -> list[torch.Tensor]:
        leaf, of_weight = values.clone().requires_grad_(), weight.clone().requires_grad_()
        mask = spartan.soft_topk(leaf, number, beta=number, backend=backend)
        both = spartan.soft_topk_global([leaf, of_weight], number, beta=number, backend=backend)
        masked = spartan.masked_weight(of_weight, soft, hard, beta=number, costs=number, backend=backend)
        out = [mask, *both, masked, ops.hard_topk(values, number, backend=backend)]
        grads = torch.autograd.grad([m.square().sum() for m in out[:4]], [leaf, of_weight])
        return [*out, *grads]

    for one, other in zip(found(2.5), found(tensor), strict=True):
        assert torch.equal(one, other)


def test_declared_operands_are_tensors() -> None:
    values = torch.randn(3, 5)
    soft = as_declared(SoftTopk(values, 2.0, None, 3.0))  # type: ignore[arg-type]
    assert (soft.budget.tolist(), soft.beta.shape, soft.beta.dtype) == ([2.0] * 3, (), torch.float64)
    hard = HardTopk(values, torch.ones(3, dtype=torch.float64), None)
    assert as_declared(hard) is hard
    masked = as_declared(MaskedWeight(values, None, None, 1.0, 4.0, 1, 1, True))  # type: ignore[arg-type]
    assert (masked.beta.item(), masked.costs.item(), masked.costs.shape) == (1.0, 4.0, ())


def test_an_integer_number_is_taken_and_a_bool_is_refused() -> None:
    values = torch.randn(3, 5)
    assert torch.equal(spartan.soft_topk(values, 2, beta=3), spartan.soft_topk(values, 2.0, beta=3.0))
    with pytest.raises(TypeError, match="budget must be a number"):
        spartan.soft_topk(values, True)
    with pytest.raises(ValueError, match=r"beta must be finite and at least 0; got -1\.0"):
        spartan.soft_topk(values, 2.0, beta=-1.0)


THREADS = """
import os, torch, spartan

def threads(): return set(os.listdir("/proc/self/task"))

def woken(side, tokens):
    torch.set_num_threads(1)
    x, w = (torch.randn(n, side, requires_grad=True) for n in (tokens, side))
    gate, grad = torch.ones(side // 32, side // 32), torch.ones(tokens, side)
    layout = spartan.BlockLayout.from_gate(gate, (side, side), 32)
    packed = spartan.BlockSparseWeight.from_dense(w.detach(), 32)
    torch.ones(1, requires_grad=True).sum().backward()  # starts the threads of PyTorch's engine
    torch.set_num_threads(4)
    before = threads()
    spartan.masked_linear(x, w, gate, layout=layout, backward_layout=layout).backward(grad)
    spartan.block_sparse_linear(x, packed)
    return threads() - before  # by name: threads of others may end meanwhile

assert not woken(64, 8), "a small product woke other threads"
assert woken(512, 128), "a large product did not use the threads"
"""


@needs_native
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by Linux's /proc")
def test_a_small_product_runs_on_the_calling_thread() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
