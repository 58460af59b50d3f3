"""What `torch.vmap` does with an operator: rows take the batch as more rows, the others are called once for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spartan_kernels.torch_private import tree_flatten, tree_unflatten

# (info, in_dims, *operands) -> (outputs, out_dims), as torch.library.register_vmap wants it
Rule = Callable[..., tuple[Any, Any]]


def loop(operator: Any, structure: Any) -> Rule:
    """Call `operator` once for each entry of the batch and stack what it returns."""

    def rule(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"vmap over {operator} needs a batch of at least one; got 0")
        leaves, structure = tree_flatten(operands)
        dims = tree_flatten(in_dims)[0]
        results = []
        for index in range(info.batch_size):
            entry = [x if d is None else x.select(d, index) for x, d in zip(leaves, dims, strict=True)]
            results.append(tree_flatten(operator(*tree_unflatten(entry, structure))))
        outputs = results[0][1]
        stacked = [torch.stack(parts) for parts in zip(*(parts for parts, _ in results), strict=True)]
        return tree_unflatten(stacked, outputs), tree_unflatten([0] * len(stacked), outputs)

    return rule


def fold_rows(*by_row: str) -> Callable[[Any, Any], Rule]:
    """Fold the batch into the rows of an operator whose operands of these names have one entry for each row.

    Costs, where there are any, follow them, shared or not. What else may be batched (beta) is one number for the whole
    call: then `loop`.
    """

    def make(operator: Any, structure: Any) -> Rule:
        one_by_one = loop(operator, structure)

        def rule(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
            o, dims = structure(*operands), structure(*in_dims)._asdict()
            if any(dim is not None for name, dim in dims.items() if name not in (*by_row, "costs")):
                return one_by_one(info, in_dims, *operands)
            size = info.batch_size
            batched = {}
            for name in by_row:
                x, dim = getattr(o, name), dims[name]
                batched[name] = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            rows, length = batched["values"].shape[1:]
            folded = {name: x.reshape(size * rows, *x.shape[2:]) for name, x in batched.items()}
            if "costs" in dims:
                folded["costs"] = _fold_costs(o.costs, dims["costs"], size, rows, length)
            result = operator(*o._replace(**folded))
            outputs = result if isinstance(result, tuple) else (result,)
            # an output that was not asked for is empty and belongs to no row
            unfolded = tuple(x.unflatten(0, (size, rows)) if x.shape[0] == size * rows else x for x in outputs)
            dims_out = tuple(0 if x.shape[0] == size * rows else None for x in outputs)
            return (unfolded, dims_out) if isinstance(result, tuple) else (unfolded[0], dims_out[0])

        return rule

    return make


def _fold_costs(costs: torch.Tensor | None, dim: int | None, size: int, rows: int, length: int) -> torch.Tensor | None:
    """Costs [], [n] or [rows, n] of each entry of the batch, as costs of the folded rows."""
    if costs is None or (dim is None and costs.dim() < 2):
        return costs
    each = costs.movedim(dim, 0) if dim is not None else costs[None]
    if each.dim() < 3:
        each = each.reshape(each.shape[0], 1, -1)
    return each.expand(size, rows, length).reshape(size * rows, length)
