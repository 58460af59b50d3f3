"""sampled_matmul: value and gradients at the active blocks, zeros elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spartan
from spartan_kernels.testing import assert_within_error_budget, make_values, oracle_expand_blocks

pytestmark = [
    pytest.mark.operators("sampled_matmul_forward", "block_layout", "masked_linear_forward", "masked_linear_backward"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@given(
    m=st.integers(1, 40),
    k=st.integers(0, 30),
    n=st.integers(1, 40),
    block_size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradients(
    target: Any, m: int, k: int, n: int, block_size: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    a = make_values("normal", (m, k), seed=seed, dtype=dtype)
    b = make_values("normal", (k, n), seed=seed + 1, dtype=dtype)
    upstream = make_values("normal", (m, n), seed=seed + 2, dtype=dtype)
    grid = (-(-m // block_size[0]), -(-n // block_size[1]))
    mask = make_values("uniform", grid, seed=seed + 3) < 0.5
    wide = oracle_expand_blocks(mask, (m, n), block_size)
    moved = [t.to(target.device).requires_grad_() for t in (a, b)]
    c = spartan.sampled_matmul(*moved, mask.to(target.device), block_size, backend=target.backend)
    grads = torch.autograd.grad(c, moved, upstream.to(target.device))
    kept = torch.where(wide, upstream.double(), 0.0)
    exact = (torch.where(wide, a.double() @ b.double(), 0.0), kept @ b.double().mT, a.double().mT @ kept)
    for name, got, want in zip(("c", "grad a", "grad b"), (c, *grads), exact, strict=True):
        assert got.dtype == dtype
        # sums of products in an order of the kernel's own, rounded once at the end
        floor = 8 * torch.finfo(dtype).eps * (1 + float(want.detach().abs().max())) if want.numel() else 0.0
        assert_within_error_budget(got.detach().cpu(), want, want.to(dtype), floor=floor, name=name)
    assert not c.detach().cpu()[~wide].any()


def test_gradcheck(target: Any) -> None:
    a = make_values("normal", (5, 4), seed=1, dtype=torch.float64, device=target.device).requires_grad_()
    b = make_values("normal", (4, 7), seed=2, dtype=torch.float64, device=target.device).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, True, False], [True, True, False]], device=target.device)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return spartan.sampled_matmul(a, b, mask, (2, 3), backend=target.backend)

    assert torch.autograd.gradcheck(product, (a, b))


def test_layout_opcheck_and_compile(target: Any) -> None:
    a = make_values("normal", (6, 5), seed=1, device=target.device).requires_grad_()
    b = make_values("normal", (8, 5), seed=2, device=target.device).mT.requires_grad_()
    gate = torch.tensor([[0.0, 2.0], [1.0, 0.0]], device=target.device)
    layout = spartan.BlockLayout.from_gate(gate, (6, 8), (3, 4), backend=target.backend)
    operator = torch.ops.spartan.sampled_matmul_forward.default
    torch.library.opcheck(operator, (a, b, layout.tensors(), 3, 4, target.backend))

    def product(a: Tensor, b: Tensor) -> Tensor:
        return spartan.sampled_matmul(a, b, None, (3, 4), layout=layout, backend=target.backend)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), product(a, b))
    assert torch.equal(product(a, b), spartan.sampled_matmul(a, b, gate, (3, 4), backend=target.backend))


def test_autocast(target: Any) -> None:
    a, b = torch.ones(4, 4, device=target.device), torch.ones(4, 4, device=target.device)
    mask = torch.eye(2, dtype=torch.bool, device=target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        assert spartan.sampled_matmul(a, b, mask, 2, backend=target.backend).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"a": torch.ones(4, 3)}, ValueError, r"a must.*\(4, 3\).*\(5, 6\)"),
        ({"a": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "a must.*int64"),
        ({"b": torch.ones(5, 6, dtype=torch.float64)}, ValueError, "b must be.*float32.*float64"),
        ({"mask": torch.ones(3, 3)}, ValueError, r"gate.*\(2, 3\).*\(3, 3\)"),
        ({"mask": None}, ValueError, "mask and layout.*neither"),
        ({"block_size": 0}, ValueError, "block_size.*0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(target: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {
        "a": torch.ones(4, 5),
        "b": torch.ones(5, 6),
        "mask": torch.ones(2, 3),
        "block_size": 2,
        "backend": target.backend,
        **arguments,
    }
    with pytest.raises(error, match=f"(?is){message}"):
        spartan.sampled_matmul(**call)
