"""Products with a few rows of a table for each query: scores of kept pairs, sums of kept rows, attention by both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["attention_at_kept", "gathered_dot", "gathered_sum"]

# A row that is fetched takes about the time of so many in a dense product. In float32, forward and backward of both
# products move 24 d bytes for a fetched row, and make 12 d flops for a row of a dense product. A CPU core makes about
# 8 flops in the time in which it moves a byte; a GPU makes more.
_ROWS_A_FETCH = 16
_SUM = 0  # the mode of PyTorch's bags


def prefers_dense(kept: int, rows: int) -> bool:
    """Whether all products with `rows` rows, of which `kept` are read, take less time than to fetch these."""
    return rows <= _ROWS_A_FETCH * kept


def gathered_dot(
    x: Tensor, table: Tensor, indices: Tensor, *, sparse: bool = False, dense: bool | None = None
) -> Tensor:
    """Products of queries with the rows of a table that each names: y_mj = sum_d x_md t_{i_mj, d}.

    Args:
        x: `[..., m, d]`.
        table: t, `[..., n, d]` of the same leading dimensions and dtype.
        indices: i, `[..., m, k]` int64 in [0, n).
        sparse: the gradient of the table is a sparse tensor of the rows used; needs a table `[n, d]`.
        dense: multiply by all rows and read those named, instead of fetching rows. None: where n is at most 16 k.

    Returns:
        y `[..., m, k]`; differentiable (once) in x and the table. Rows are not copied.

    Raises:
        ValueError: shapes or dtypes that do not match, or a sparse gradient of a table of more than two dimensions.
    """
    _check("x", x, table, indices, sparse)
    if x.shape[-1] != table.shape[-1]:
        raise ValueError(f"x must have the width {table.shape[-1]} of the table; got {list(x.shape)}")
    if not sparse and (prefers_dense(indices.shape[-1], table.shape[-2]) if dense is None else dense):
        return (x @ table.mT).gather(-1, indices)
    flat, at = _flat(table, indices)
    return _Dot.apply(x.reshape(-1, x.shape[-1]), flat, at, sparse).view(indices.shape)


def gathered_sum(
    weights: Tensor, table: Tensor, indices: Tensor, *, sparse: bool = False, dense: bool | None = None
) -> Tensor:
    """Weighted sums of the rows of a table that each query names: y_md = sum_j w_mj t_{i_mj, d}.

    Args:
        weights: w, `[..., m, k]`.
        table: t, `[..., n, d]` of the same leading dimensions and dtype.
        indices: i, `[..., m, k]` int64 in [0, n); a row named twice counts twice.
        sparse: as in `gathered_dot`.
        dense: put the weights into a matrix `[m, n]` and multiply, instead of fetching rows. None: where n is at most
            16 k.

    Returns:
        y `[..., m, d]`; differentiable in the weights and the table. Rows are not copied.

    Raises:
        ValueError: as `gathered_dot`.
    """
    _check("weights", weights, table, indices, sparse)
    if weights.shape != indices.shape:
        raise ValueError(f"weights must be {list(indices.shape)} as the indices are; got {list(weights.shape)}")
    if not sparse and (prefers_dense(indices.shape[-1], table.shape[-2]) if dense is None else dense):
        scattered = weights.new_zeros(*weights.shape[:-1], table.shape[-2])
        return scattered.scatter_add(-1, indices, weights) @ table
    flat, at = _flat(table, indices)
    bags = F.embedding_bag(at, flat, mode="sum", per_sample_weights=weights.reshape(at.shape), sparse=sparse)
    return bags.view(*indices.shape[:-1], table.shape[-1])


def attention_at_kept(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, bias: Tensor | None = None, dense: bool | None = None
) -> Tensor:
    """Attention of each query to its kept keys alone.

    y_q = sum_j softmax_j(<q_q, k_{i_qj}> / sqrt(d) + b_qj) v_{i_qj}

    Args:
        query: `[n, heads, q, d]`.
        key: `[n, heads, t, d]`.
        value: `[n, heads, t, d]`.
        indices: i, the kept keys of each query, `[n, heads, q, k]` int64, each once.
        bias: b, `[n, heads, q, k]`, or shaped to broadcast to it; -inf leaves a key out. A query needs one that stays.
        dense: products with all keys and values, masked, instead of fetching those kept. None: where t is at most 16 k.

    Returns:
        y `[n, heads, q, d]`; differentiable (once) in query, key, value and bias.
    """
    scores = gathered_dot(query, key, indices, dense=dense) * query.shape[-1] ** -0.5
    shares = (scores if bias is None else scores + bias).softmax(-1)
    return gathered_sum(shares.to(value.dtype), value, indices, dense=dense)


def _check(name: str, first: Tensor, table: Tensor, indices: Tensor, sparse: bool) -> None:
    if indices.ndim < 2 or table.ndim != indices.ndim or table.shape[:-2] != indices.shape[:-2]:
        raise ValueError(
            "table and indices must have two dimensions or more and the same leading ones; got "
            f"{list(table.shape)} and {list(indices.shape)}"
        )
    if first.shape[:-1] != indices.shape[:-1]:
        raise ValueError(f"{name} must be [{', '.join(map(str, indices.shape[:-1]))}, ...]; got {list(first.shape)}")
    if first.dtype != table.dtype or indices.dtype != torch.int64:
        raise ValueError(
            f"{name} must have the dtype {table.dtype} of the table, and indices int64; got {first.dtype} and "
            f"{indices.dtype}"
        )
    if sparse and table.ndim != 2:
        raise ValueError(f"sparse=True needs a table [n, d]; got {list(table.shape)}")
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():  # a GPU is not asked
        least, most = indices.aminmax()
        if least < 0 or most >= table.shape[-2]:
            raise IndexError(f"indices must be from 0 to {table.shape[-2] - 1}; got {int(least)} to {int(most)}")


def _flat(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """One table `[b * n, d]` of all, and where in it the rows of each query are, `[b * m, k]`."""
    rows, width = table.shape[-2:]
    if table.ndim == 2:
        return table, indices  # no view of it: a sparse gradient has none
    flat = table.reshape(-1, width)
    starts = torch.arange(0, flat.shape[0], rows, device=indices.device).view(-1, 1, 1)
    return flat, (indices.reshape(-1, *indices.shape[-2:]) + starts).view(-1, indices.shape[-1])


class _Dot(torch.autograd.Function):
    """Products with rows as PyTorch's sum of rows has them for its own gradient, and the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, indices: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(x, table, indices)
        ctx.sparse = sparse
        count, kept = indices.shape
        starts = torch.arange(0, count * kept, kept, device=x.device)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, table, indices.view(-1), starts, _owners(indices), _SUM
        ).view(indices.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, table, indices = ctx.saved_tensors
        of_x = of_table = None
        if ctx.needs_input_grad[0]:
            of_x = F.embedding_bag(indices, table, mode="sum", per_sample_weights=grad)
        if ctx.needs_input_grad[1] and ctx.sparse:
            rows = (grad.unsqueeze(-1) * x.unsqueeze(1)).flatten(0, 1)
            of_table = torch.sparse_coo_tensor(
                indices.view(1, -1), rows, table.shape, device=rows.device, check_invariants=False
            )
        elif ctx.needs_input_grad[1]:
            unused = indices.new_zeros(len(x))
            of_table = torch.ops.aten._embedding_bag_dense_backward(
                *(x, indices.view(-1), _owners(indices), unused, unused),
                *(len(table), False, _SUM, grad.reshape(-1)),
            )
        return of_x, of_table, None, None


def _owners(indices: Tensor) -> Tensor:
    """The query that each of the indices `[m, k]` belongs to, `[m * k]`."""
    return torch.arange(indices.shape[0], device=indices.device).repeat_interleave(indices.shape[1])
