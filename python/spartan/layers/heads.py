"""Projections into heads and back: what the attention layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Heads", "check_heads"]


class Heads(nn.Module):
    """Linear layers `query`, `key`, `value` and `projection` of multi-head attention over `[n, tokens, dim]`.

    Raises:
        ValueError: heads below 1, or `dim` no multiple of them.
    """

    def __init__(self, dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim must be a positive multiple of heads; got dim {dim}, heads {heads}")
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.projection = nn.Linear(dim, dim, bias=bias)

    def split(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[n, heads, tokens, dim / heads]`; the last two of `context` where there is one."""
        context = x if context is None else context
        dim = self.query.in_features
        for name, given in (("x", x), ("context", context)):
            if given.dim() != 3 or given.shape[2] != dim:
                raise ValueError(f"{name} must be [n, tokens, {dim}]; got shape {list(given.shape)}")
        projected = (self.query(x), self.key(context), self.value(context))
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)
        return query, key, value

    def join(self, attended: Tensor) -> Tensor:
        """Map `[n, heads, tokens, dim / heads]` to the layer's output `[n, tokens, dim]`."""
        return self.projection(attended.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def copy_projections(self, attention: nn.Module) -> None:
        """Take the weights of a trained attention of the same size.

        Raises:
            TypeError: `attention` is not of the kinds that `projections_of` knows.
            ValueError: it has another number of heads, or biases where this layer has none, or none where it has.
        """
        joint, projection = projections_of(attention)
        if heads_of(attention) not in (None, self.heads):
            raise ValueError(f"attention must have {self.heads} heads; got {heads_of(attention)}")
        if (joint[1] is None) != (self.query.bias is None):
            raise ValueError(f"attention must have {'no ' if self.query.bias is None else ''}biases, as this layer")
        for layer, weight in zip((self.query, self.key, self.value), joint[0].chunk(3), strict=True):
            layer.weight.copy_(weight)
        self.projection.weight.copy_(projection.weight)
        if joint[1] is not None:
            for layer, bias in zip((self.query, self.key, self.value), joint[1].chunk(3), strict=True):
                layer.bias.copy_(bias)
            self.projection.bias.copy_(projection.bias)


def heads_of(attention: nn.Module) -> int | None:
    """The number of heads that an attention says it has, as `num_heads` or `heads`; None if it says none."""
    return getattr(attention, "num_heads", None) or getattr(attention, "heads", None)


def projections_of(attention: Any) -> tuple[tuple[Tensor, Tensor | None], nn.Linear]:
    """Joint weight and bias of query, key and value `[3 dim, dim]`, `[3 dim]`, and the output layer.

    Raises:
        TypeError: neither an `nn.MultiheadAttention` of one size of input, nor a module with linear layers
            `query_key_value` and `projection`, as `spartan.training.models.Attention` has them.
    """
    if isinstance(attention, nn.MultiheadAttention) and attention.in_proj_weight is not None:
        if attention.bias_k is None and not attention.add_zero_attn and attention.batch_first:
            return (attention.in_proj_weight, attention.in_proj_bias), attention.out_proj
    joint, projection = (getattr(attention, name, None) for name in ("query_key_value", "projection"))
    if isinstance(joint, nn.Linear) and isinstance(projection, nn.Linear):
        return (joint.weight, joint.bias), projection
    raise TypeError(
        "attention must be an nn.MultiheadAttention (batch_first, kdim and vdim as embed_dim, no bias_k, no"
        f" zero attention) or have the linear layers query_key_value and projection; got {type(attention).__name__}"
    )


def check_heads(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> None:
    """Refuse operands that are not `[n, heads, tokens, dim]` of one n, heads, dtype, and dim of query and key.

    Causal ones need as many queries as keys too.

    Raises:
        ValueError: otherwise.
    """
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"query, key and value must be [n, heads, tokens, dim]; got {shapes}")
    if not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        raise ValueError(f"query, key and value must have the same n and heads; got {shapes}")
    if query.shape[3] != key.shape[3] or key.shape[2] != value.shape[2]:
        raise ValueError(f"key must have the dim of query and the tokens of value; got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype; got {query.dtype}, {key.dtype}, {value.dtype}")
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(f"is_causal needs as many queries as keys; got {query.shape[2]} queries, {key.shape[2]} keys")
