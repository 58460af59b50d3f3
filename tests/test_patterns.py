"""sparsity_pattern: N:M masks, hard and soft, of linear and convolution weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import spartan
from spartan_kernels.testing import make_values, oracle_hard_topk, oracle_soft_topk

pytestmark = [
    pytest.mark.operators("soft_topk_forward", "soft_topk_backward", "hard_topk_forward"),
    pytest.mark.usefixtures("poisoned_memory"),
]

# (n, m, shape, dim)
PATTERNS = [
    (2, 4, (6, 16), -1),
    (1, 4, (5, 8), 1),
    (4, 8, (3, 24), -1),
    (2, 4, (8, 5), 0),
    (2, 4, (4, 8, 3, 3), 1),
    (1, 2, (2, 3, 3, 4), -1),
    (0, 4, (2, 8), -1),
    (4, 4, (2, 8), -1),
    (1, 1, (2, 3), -1),
    (3, 7, (35,), 0),
]


def groups(tensor: Tensor, m: int, dim: int) -> Tensor:
    """[groups, m]"""
    return tensor.movedim(dim, -1).reshape(-1, m)


@pytest.mark.parametrize(("n", "m", "shape", "dim"), PATTERNS)
@pytest.mark.parametrize("distribution", ["normal", "quantised", "all_equal"])
def test_the_largest_of_each_group(
    target: Any, n: int, m: int, shape: tuple[int, ...], dim: int, distribution: str
) -> None:
    weight = make_values(distribution, shape)
    mask = spartan.sparsity_pattern(weight.to(target.device), n, m, dim, backend=target.backend).cpu()
    assert mask.dtype == torch.bool and mask.shape == weight.shape
    assert (groups(mask, m, dim).sum(-1) == n).all()  # exact, also on ties
    assert torch.equal(groups(mask, m, dim), oracle_hard_topk(groups(weight, m, dim).abs(), n))


@pytest.mark.parametrize(("n", "m", "shape", "dim"), PATTERNS)
def test_soft_pattern_and_its_gradient(target: Any, n: int, m: int, shape: tuple[int, ...], dim: int) -> None:
    weight = make_values("normal", shape)
    upstream = make_values("normal", shape, seed=1)
    exact_leaf = weight.double().requires_grad_()
    exact = oracle_soft_topk(groups(exact_leaf, m, dim).abs(), n, beta=3.0)
    (exact_gradient,) = torch.autograd.grad(exact, exact_leaf, groups(upstream.double(), m, dim))
    hard = spartan.sparsity_pattern(weight, n, m, dim, backend="reference").float()
    for straight_through in (False, True):
        leaf = weight.to(target.device).requires_grad_()
        beta = torch.tensor(3.0, device=target.device, requires_grad=True)
        mask = spartan.sparsity_pattern(
            leaf, n, m, dim, beta=beta, straight_through=straight_through, backend=target.backend
        )
        gradients = torch.autograd.grad(mask, (leaf, beta), upstream.to(target.device))
        assert mask.dtype == weight.dtype and mask.shape == weight.shape
        if straight_through:
            assert torch.equal(mask.detach().cpu(), hard)
        else:
            torch.testing.assert_close(groups(mask.detach().cpu(), m, dim).double(), exact.detach(), rtol=0, atol=4e-6)
        torch.testing.assert_close(gradients[0].cpu().double(), exact_gradient, rtol=1e-4, atol=1e-5)
        assert gradients[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_and_layouts(target: Any, dtype: torch.dtype) -> None:
    weight = make_values("normal", (8, 12), dtype=dtype).T
    mask = spartan.sparsity_pattern(weight.to(target.device), 2, 4, backend=target.backend).cpu()
    assert torch.equal(groups(mask, 4, -1), oracle_hard_topk(groups(weight, 4, -1).abs(), 2))


def test_nothing_to_choose_from(target: Any) -> None:
    for shape in ((0, 8), (3, 0)):
        weight = torch.empty(shape, device=target.device)
        assert spartan.sparsity_pattern(weight, 2, 4, backend=target.backend).shape == shape
        assert spartan.sparsity_pattern(weight, 2, 4, beta=2.0, backend=target.backend).shape == shape


def test_one_graph_for_every_shape(target: Any) -> None:
    torch._dynamo.reset()

    def step(w: Tensor, beta: float) -> Tensor:
        return w * spartan.sparsity_pattern(w, 2, 4, beta=beta, straight_through=True, backend=target.backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns, beta in ((3, 8, 1.0), (5, 12, 2.5)):
        weight = make_values("normal", (rows, columns), device=target.device)
        torch.testing.assert_close(compiled(weight, beta), step(weight, beta))


W = torch.ones(6, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": [1.0]}, TypeError, "weight.*list"),
        ({"weight": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "weight.*int64"),
        ({"n": 2.0}, TypeError, "n must be an int.*float"),
        ({"m": True}, TypeError, "m must be an int.*bool"),
        ({"n": 5}, ValueError, r"n must be in \[0, m\].*n=5, m=4"),
        ({"n": -1}, ValueError, "n=-1"),
        ({"n": 0, "m": 0}, ValueError, "m at least 1.*m=0"),
        ({"m": 3}, ValueError, r"weight\.shape\[-1\].*multiple of m=3.*\(6, 8\)"),
        ({"dim": 2}, ValueError, r"dim.*\[-2, 1\].*2"),
        ({"dim": 0}, ValueError, r"weight\.shape\[0\].*m=4"),
        ({"straight_through": True}, ValueError, "straight_through needs beta.*None"),
        ({"beta": -1.0}, ValueError, "beta.*-1"),
        ({"weight": torch.full((2, 4), float("nan"))}, ValueError, "values must be finite"),
    ],
)
def test_bad_input_is_named(target: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    if target.device != "cpu":
        pytest.skip("on a GPU values are inspected only under checks(True)")
    with pytest.raises(error, match=f"(?s){message}"):
        spartan.sparsity_pattern(**{"weight": W, "n": 2, "m": 4, "backend": target.backend, **arguments})
