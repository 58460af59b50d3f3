"""Very many experts of one neuron each, found by two codebooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spartan.layers.gathered import gathered_dot, gathered_sum
from spartan.layers.selection import kept_indices

__all__ = ["ProductKeyExperts", "product_key_topk"]

_ROUTERS: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda s: s.softmax(-1), "sigmoid": torch.sigmoid}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def product_key_topk(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest of all sums of an entry of one list and an entry of another, without forming them all.

        s_(i n + j) = a_i + b_j

    The p-th largest of a and the q-th largest of b have a sum that p q - 1 others are no smaller than. So it is among
    the k largest only where p q <= k, and about k ln k sums are compared.

    Args:
        first: a, `[..., n]`.
        second: b, `[..., n]`.
        k: from 1 to n^2.

    Returns:
        The sums, differentiable in a and b, and their indices int64, each `[..., k]`, in no order of rank.

    Raises:
        ValueError: k outside [1, n^2], or lists of different shapes.

    Source: Lample et al., "Large Memory Layers with Product Keys", NeurIPS 2019, section 3.1.
    """
    n = first.shape[-1]
    if first.shape != second.shape:
        raise ValueError(f"first and second must have one shape; got {list(first.shape)} and {list(second.shape)}")
    if not 1 <= k <= n * n:
        raise ValueError(f"k must be from 1 to the {n * n} sums; got {k}")
    top = min(k, n)
    with torch.no_grad():
        (a, of_a), (b, of_b) = first.topk(top), second.topk(top)
        firsts = [(slice(p, p + 1), slice(k // (p + 1))) for p in range(top)]
        sums = torch.cat([a[..., p] + b[..., q] for p, q in firsts], -1)
        places = torch.cat([of_a[..., p] * n + of_b[..., q] for p, q in firsts], -1)
        indices = places.gather(-1, kept_indices(sums, k))
    return first.gather(-1, indices // n) + second.gather(-1, indices % n), indices


class ProductKeyExperts(nn.Module):
    """A feed-forward layer of N experts of one neuron each, of which a token uses `heads` times k.

        q_h = norm(W x)_h = (q_h1, q_h2);  s_hij = <q_h1, c_1i> + <q_h2, c_2j>;  I_h the k largest of s_h
        y = sum_h sum over e in I_h of g(s_he) act(<u_e, x>) v_e

    The sub-keys c_1 and c_2, sqrt(N) each, and the experts u, v are shared by the heads. g is a softmax over I_h, or a
    sigmoid of each. The selection is exact over all N sums (`product_key_topk`). Rows of u and v are not copied.

    Args:
        dim: width of a token.
        experts: N, a square number.
        heads: queries of a token, each with experts of its own.
        k: experts of a head, from 1 to N.
        key_dim: width of a query, even; a sub-key has half of it.
        router: g, "softmax" or "sigmoid". With k = 1, a softmax is 1 and the router learns nothing.
        activation: act, "gelu", "relu" or "silu".
        query_norm: batch normalisation of the queries, over all tokens of the batch.
        sparse: u and v get sparse gradients of the rows used, for `torch.optim.SparseAdam` and the like, and not
            under `torch.compile`.

    Raises:
        ValueError: a setting out of its range; an input of another width.

    Source: He, "Mixture of A Million Experts", 2024, arXiv:2407.04153; Lample et al., "Large Memory Layers with
    Product Keys", NeurIPS 2019.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        heads: int = 8,
        k: int = 16,
        key_dim: int = 32,
        router: Literal["softmax", "sigmoid"] = "softmax",
        activation: Literal["gelu", "relu", "silu"] = "gelu",
        query_norm: bool = True,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        side = math.isqrt(max(experts, 0))
        if experts < 1 or side * side != experts:
            raise ValueError(f"experts must be a square number; got {experts}")
        if not 1 <= k <= experts:
            raise ValueError(f"k must be from 1 to the {experts} experts; got {k}")
        if key_dim < 2 or key_dim % 2:
            raise ValueError(f"key_dim must be even and at least 2; got {key_dim}")
        for name, given, allowed in (("router", router, _ROUTERS), ("activation", activation, _ACTIVATIONS)):
            if given not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {given!r}")
        if heads < 1:
            raise ValueError(f"heads must be at least 1; got {heads}")
        self.dim, self.experts, self.heads, self.k = dim, experts, heads, k
        self.router, self.activation, self.sparse = router, activation, sparse
        self.query = nn.Linear(dim, heads * key_dim, bias=not query_norm)
        self.norm = nn.BatchNorm1d(heads * key_dim) if query_norm else None
        self.keys = nn.Parameter(torch.randn(2, side, key_dim // 2) * (key_dim // 2) ** -0.5)
        self.down = nn.Parameter(torch.randn(experts, dim) * dim**-0.5)
        self.up = nn.Parameter(torch.randn(experts, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., dim]` to the same shape."""
        tokens = self._tokens(x)
        gates, indices = self._choose(tokens)
        tokens = tokens.to(self.down.dtype)  # under autocast too: rows of the table are read as they are
        hidden = _ACTIVATIONS[self.activation](gathered_dot(tokens, self.down, indices, sparse=self.sparse))
        weights = (gates * hidden).to(self.up.dtype)
        return gathered_sum(weights, self.up, indices, sparse=self.sparse).view(x.shape).to(x.dtype)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights g and indices e int64 of the experts of each token `[..., dim]`, each `[..., heads, k]`."""
        shape = (*x.shape[:-1], self.heads, self.k)
        gates, indices = self._choose(self._tokens(x))
        return gates.view(shape), indices.view(shape)

    def active_parameters(self) -> int:
        """Parameters that a token is multiplied by: the query, all sub-keys, and the experts that it uses."""
        query = [*self.query.parameters(), *(self.norm.parameters() if self.norm else ())]
        return sum(p.numel() for p in query) + self.keys.numel() + 2 * self.heads * self.k * self.dim

    def extra_repr(self) -> str:
        """Settings in the module's description."""
        settings = f"{self.dim}, experts={self.experts}, heads={self.heads}, k={self.k}, router={self.router!r}"
        return f"{settings}, activation={self.activation!r}, sparse={self.sparse}"

    def _tokens(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [..., {self.dim}]; got {list(x.shape)}")
        return x.reshape(-1, self.dim)

    def _choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        query = self.query(tokens)
        query = query if self.norm is None else self.norm(query)
        halves = query.view(len(tokens), self.heads, 2, self.keys.shape[-1]).unbind(2)
        first, second = (half @ keys.T for half, keys in zip(halves, self.keys, strict=True))
        scores, indices = product_key_topk(first, second, self.k)
        return _ROUTERS[self.router](scores).flatten(1), indices.flatten(1)
