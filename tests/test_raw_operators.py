"""Raw operators with one changed operand: with checks on, each call is refused or is another problem, solved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from spartan_kernels import dispatch, info, probes
from spartan_kernels.ops import _checked, _define


class _Recorder(TorchDispatchMode):
    """The operands of the operators of this package that are called in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "spartan":
            self.calls[func._schema.name.split("::")[1]] = (func, args)
        return func(*args, **(kwargs or {}))


@cache
def recorded_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """A good call of every operator."""
    moved = probes.inputs_on(probes.make_inputs(), "cpu")
    recorder = _Recorder()
    with recorder:
        for probe in probes.probes():
            probe.call(moved, "reference")
    return recorder.calls


def bad_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor in shapes and types that it may not have; one on another device has PyTorch choose another kernel."""
    yield "int8", tensor.to(torch.int8)
    yield "complex", tensor.to(torch.complex64)
    yield "unsqueezed", tensor[None]
    if tensor.dim():
        yield "empty", tensor.new_empty(0)
        yield "shorter", tensor[:-1].contiguous()
        yield "longer", torch.cat([tensor, tensor[:1]])
        yield "narrower", tensor[..., :-1].contiguous()
        yield "scalar", tensor.flatten()[0]
    if tensor.dtype == torch.int32:
        yield "negative", torch.full_like(tensor, -1)
        yield "huge", torch.full_like(tensor, 2**31 - 1)
        yield "reversed", tensor.flip(0) - 1


def bad_operands(value: Any) -> Iterator[tuple[str, Any]]:
    """What may not stand in place of an operand."""
    if isinstance(value, torch.Tensor):
        yield from bad_tensors(value)
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        yield "no tensors", []
        yield "one tensor less", list(value[:-1])
        yield "one tensor more", [*value, value[0]]
        for index in range(len(value)):
            for kind, bad in bad_tensors(value[index]):
                yield f"[{index}] {kind}", [*value[:index], bad, *value[index + 1 :]]
    elif isinstance(value, (list, tuple)) and value:
        yield "one less", list(value[:-1])
        if isinstance(value[0], int) and not isinstance(value[0], bool):
            yield "negative", [-1, *value[1:]]
            yield "huge", [2**40, *value[1:]]
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from (("zero", 0), ("negative", -1), ("huge", 2**40))
    elif isinstance(value, str) and value:
        yield "nonsense", "nonsense"


def outcome(overload: Any, operands: list[Any], backend: str) -> list[torch.Tensor] | None:
    """What a call returns and writes, or None where it is refused."""
    own = pytree.tree_map(lambda o: o.clone() if isinstance(o, torch.Tensor) else o, operands)
    try:
        returned = overload(*own, backend)
    except (ValueError, TypeError, RuntimeError):
        return None
    written = [o for o, a in zip(own, overload._schema.arguments, strict=False) if a.alias_info is not None]
    return [t for t in pytree.tree_leaves((returned, written)) if isinstance(t, torch.Tensor)]


def call_with_bad_operands(operator: str) -> list[str]:
    """The operands of `operator` that were neither refused nor, as another good problem, solved."""
    overload, good = recorded_calls()[operator]
    ours = (
        "native" if "native" in dispatch.SUPPORT[operator] else "reference"
    )  # which then takes what the check lets by
    wrong = []
    for index, argument in enumerate(overload._schema.arguments[:-1]):
        for kind, bad in bad_operands(good[index]):
            operands = [*good[:index], bad, *good[index + 1 : -1]]
            found, expected = (outcome(overload, operands, name) for name in (ours, "reference"))
            if (found is None) != (expected is None):
                wrong.append(f"{argument.name}: {kind}, refused by one backend alone")
            elif (
                found is not None
                and expected is not None
                and probes.compare(found, [e.double() if e.is_floating_point() else e for e in expected])
            ):
                wrong.append(f"{argument.name}: {kind}, computed otherwise than by the reference")
    return wrong


def test_every_operator_has_a_check() -> None:
    assert _checked.CHECKS.keys() == _define.OPERATORS.keys()


@pytest.mark.skipif(not info()["native"]["available"], reason="compares the native backend with the reference")
def test_a_bad_operand_is_refused() -> None:
    """In a process of its own: a crash would end it."""
    script = """
from tests.test_raw_operators import call_with_bad_operands, recorded_calls
for operator in recorded_calls():
    print(operator, flush=True)
    for wrong in call_with_bad_operands(operator):
        print("wrong:", operator, wrong, flush=True)
"""
    environment = os.environ | {"SPARTAN_CHECK_OPERANDS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"
    assert [line for line in done.stdout.splitlines() if line.startswith("wrong:")] == []


def test_the_error_names_operator_and_operand() -> None:
    overload, operands = recorded_calls()["masked_weight_forward"]
    with pytest.raises(ValueError, match=r"torch.ops.spartan.masked_weight_forward: soft must be .* of shape \(5, 6\)"):
        overload(operands[0], operands[1][:-1], *operands[2:])
