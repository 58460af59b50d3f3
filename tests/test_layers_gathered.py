"""Products with rows that each query names, and attention at kept keys: against loops and masked dense attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spartan.layers import attention_at_kept, gathered_dot, gathered_sum
from spartan.layers.gathered import prefers_dense

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = pytest.mark.parametrize("dense", [True, False], ids=["dense", "gathered"])


def operands(*lead: int, m: int = 5, n: int = 7, d: int = 3, k: int = 4, repeated: bool = True) -> list[Tensor]:
    """x, table, weights and indices, in float64."""
    x, table, weights = (torch.randn(*lead, *s, dtype=torch.float64) for s in ((m, d), (n, d), (m, k)))
    free, distinct = torch.randint(n, (*lead, m, k)), torch.rand(*lead, m, n).topk(k).indices
    return [x.requires_grad_(), table.requires_grad_(), weights.requires_grad_(), free if repeated else distinct]


@FORMS
def test_products_and_sums_are_those_of_a_loop(dense: bool) -> None:
    x, table, weights, indices = operands(2, 3)
    dots, sums = gathered_dot(x, table, indices, dense=dense), gathered_sum(weights, table, indices, dense=dense)
    for a in range(2):
        for b in range(3):
            for q, chosen in enumerate(indices[a, b].tolist()):
                rows = [table[a, b, i] for i in chosen]
                expected = torch.stack([(x[a, b, q] * row).sum() for row in rows])
                torch.testing.assert_close(dots[a, b, q], expected)
                total = sum(w * row for w, row in zip(weights[a, b, q], rows, strict=True))
                torch.testing.assert_close(sums[a, b, q], total)


@FORMS
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_gradients(lead: tuple[int, ...], dense: bool) -> None:
    x, table, weights, indices = operands(*lead)
    assert torch.autograd.gradcheck(lambda a, b: gathered_dot(a, b, indices, dense=dense), (x, table))
    assert torch.autograd.gradcheck(lambda a, b: gathered_sum(a, b, indices, dense=dense), (weights, table))


def test_only_gradients_that_are_wanted() -> None:
    x, table, _, indices = operands()
    expected = torch.autograd.grad(gathered_dot(x, table, indices, dense=False).sum(), (x, table))
    alone = gathered_dot(x, table.detach(), indices, dense=False)
    torch.testing.assert_close(torch.autograd.grad(alone.sum(), x)[0], expected[0])
    alone = gathered_dot(x.detach(), table, indices, dense=False)
    torch.testing.assert_close(torch.autograd.grad(alone.sum(), table)[0], expected[1])


def test_sparse_gradients_are_the_dense_ones() -> None:
    x, table, weights, indices = operands(n=100)
    for function, first in ((gathered_dot, x), (gathered_sum, weights)):
        wanted = torch.autograd.grad(function(first, table, indices).pow(2).sum(), (first, table))
        of_first, of_table = torch.autograd.grad(
            function(first, table, indices, sparse=True).pow(2).sum(), (first, table)
        )
        assert of_table.is_sparse and of_table.coalesce().indices().shape[1] == len(indices.unique())
        torch.testing.assert_close(of_table.to_dense(), wanted[1])
        torch.testing.assert_close(of_first, wanted[0])


@FORMS
def test_attention_is_masked_attention(dense: bool) -> None:
    query, key, _, indices = operands(2, 3, repeated=False)
    value = torch.randn_like(key).requires_grad_()
    bias = torch.randn(indices.shape, dtype=torch.float64).requires_grad_()
    bias.data[0, 0, 0, :3] = -torch.inf
    ours = attention_at_kept(query, key, value, indices, bias, dense)
    mask = torch.full((2, 3, 5, 7), -torch.inf, dtype=torch.float64).scatter(-1, indices, bias)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    leaves = (query, key, value, bias)
    for found, wanted in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FORMS
def test_half_precision(dtype: torch.dtype, dense: bool) -> None:
    query, key, _, indices = (o.detach() for o in operands(2, repeated=False))
    exact = attention_at_kept(query, key, key, indices)
    found = attention_at_kept(query.to(dtype), key.to(dtype), key.to(dtype), indices, dense=dense)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), exact, atol=10 * torch.finfo(dtype).eps, rtol=10 * torch.finfo(dtype).eps
    )


def test_the_form_follows_the_share_of_rows() -> None:
    assert prefers_dense(4, 64) and not prefers_dense(4, 65)
    x, table, _, indices = operands(n=65)
    assert "_Dot" in type(gathered_dot(x, table, indices).grad_fn.next_functions[0][0]).__name__
    assert "Gather" in type(gathered_dot(x, table[:64], indices.clamp(max=63)).grad_fn).__name__


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("index", [-1, 4])
def test_rows_outside_of_the_table_are_refused(index: int, dense: bool) -> None:
    table, indices = torch.randn(2, 4, 3), torch.tensor([[[0, 1]], [[1, index]]])
    with pytest.raises(IndexError, match="indices must be from 0 to 3"):
        gathered_dot(torch.randn(2, 1, 3), table, indices, dense=dense)
    with pytest.raises(IndexError, match="indices must be from 0 to 3"):
        gathered_sum(torch.randn(2, 1, 2), table, indices, dense=dense)


def test_operands_that_are_refused() -> None:
    x, table, weights, indices = operands(2)
    for function, first in ((gathered_dot, x), (gathered_sum, weights)):
        name = "x" if function is gathered_dot else "weights"
        for others in ((table[0], indices), (table, indices[:1]), (table[0, 0], indices[0, 0])):
            with pytest.raises(ValueError, match="table and indices must have two dimensions or more"):
                function(first, *others)
        with pytest.raises(ValueError, match=rf"{name} must be \[2, 5, \.\.\.\]; got \[2, 4"):
            function(first[:, :4], table, indices)
        with pytest.raises(ValueError, match=rf"{name} must have the dtype torch.float64 .*; got torch.float32"):
            function(first.float(), table, indices)
        with pytest.raises(ValueError, match=r"indices int64; got torch.float64 and torch.int32"):
            function(first, table, indices.int())
        with pytest.raises(ValueError, match=r"sparse=True needs a table \[n, d\]; got \[2, 7, 3\]"):
            function(first, table, indices, sparse=True)
    with pytest.raises(ValueError, match=r"x must have the width 3 of the table; got \[2, 5, 2\]"):
        gathered_dot(x[..., :2], table, indices)
    with pytest.raises(ValueError, match=r"weights must be \[2, 5, 4\] as the indices are; got \[2, 5, 3\]"):
        gathered_sum(weights[..., :3], table, indices)
