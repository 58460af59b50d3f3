"""N:M patterns: which weights of each group stay, as rows of a top-k."""

from __future__ import annotations

import torch

from spartan.functional.soft_topk import soft_topk
from spartan_kernels.arguments import require_float
from spartan_kernels.ops import hard_topk

__all__ = ["sparsity_pattern"]


def sparsity_pattern(
    weight: torch.Tensor,
    n: int,
    m: int,
    dim: int = -1,
    *,
    beta: float | torch.Tensor | None = None,
    straight_through: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """N:M mask of a weight: in each group of m neighbours along a dimension, the n of largest magnitude.

    Hard (beta None): h_i = 1 for the n largest |w_i| of the group, ties to the lowest index.
    Soft: p_i = sigmoid(beta |w_i| + mu), with mu for each group such that the p_i of the group sum to n.

    Args:
        weight: w, any shape, floating point.
        n: weights kept in each group, from 0 to m.
        m: size of a group; divides `weight.shape[dim]`.
        dim: the dimension that is cut into groups: the input features, -1 for a linear weight and 1 for a convolution.
        beta: sharpness of the soft mask; None for the hard one.
        straight_through: the hard mask as 0 and 1, with the gradient of the soft one (needs `beta`).
        backend: "auto" or the name of a backend.

    Returns:
        Shape of `weight`: bool for a hard mask; else its dtype (float32 for half precision under autocast),
        differentiable (once) in `weight` and `beta`.

    Raises:
        TypeError: integer weights, n or m that are not ints. ValueError: n outside [0, m], a dimension that m does not
            divide, straight_through without beta; values that are not finite, as `soft_topk`.

    Source: Mishra et al., arXiv 2104.08378 (2:4); Tai, Tian, Lim, "Spartan", NeurIPS 2022, equation (1), by groups.
    """
    require_float("weight", weight)
    for name, number in (("n", n), ("m", m)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an int; got {type(number).__name__}")
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"n must be in [0, m] and m at least 1; got n={n}, m={m}")
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim must be in [{-weight.dim()}, {weight.dim() - 1}]; got {dim}")
    if weight.shape[dim] % m:
        raise ValueError(f"weight.shape[{dim}] must be a multiple of m={m}; got weight of shape {tuple(weight.shape)}")
    if straight_through and beta is None:
        raise ValueError("straight_through needs beta, the sharpness of the mask whose gradient it takes; got None")
    dim %= weight.dim()
    scores = weight.unflatten(dim, (weight.shape[dim] // m, m)).abs()
    if beta is None:
        mask = hard_topk(scores, n, dim=dim + 1, backend=backend)
    else:
        mask = soft_topk(scores, n, beta=beta, dim=dim + 1, straight_through=straight_through, backend=backend)
    return mask.flatten(dim, dim + 1)
