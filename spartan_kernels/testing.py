"""Input makers, a float64 oracle and the error-budget assertion, shared by the tests and the benchmarks.

The oracle shares no code with any backend: the threshold is bisected to full float64 convergence, hard
selection sorts, and gradients come from autograd through one Newton step on the detached root.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_BISECTIONS = 100  # halvings from the widest bracket down to one ulp of float64, with room
# Of a product, by the name that operators take.
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}


# ----------------------------------------------------------------------------------------------------- inputs


def _heavy_tail(n: int, g: torch.Generator) -> Tensor:
    # Student t with 2 degrees of freedom: infinite variance, still a finite sample
    normal = torch.randn(n, generator=g, dtype=torch.float64)
    chi_squared = torch.randn(2, n, generator=g, dtype=torch.float64).square().sum(0)
    return normal / (chi_squared / 2).sqrt()


def _two_valued(n: int, g: torch.Generator) -> Tensor:
    return (torch.rand(n, generator=g, dtype=torch.float64) < 0.3).double() + 0.5


def _quantised(n: int, g: torch.Generator) -> Tensor:
    return (torch.randn(n, generator=g, dtype=torch.float64) * 4).round() / 4


def _mixed_scales(n: int, g: torch.Generator) -> Tensor:
    # stands for layers of very different scale under one budget
    layer_scale = 10.0 ** (torch.arange(n, dtype=torch.float64) * 4 / max(n, 1)).floor().sub(3)
    return torch.randn(n, generator=g, dtype=torch.float64) * layer_scale


DISTRIBUTIONS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64),
    "uniform": lambda n, g: torch.rand(n, generator=g, dtype=torch.float64),
    "student_t": _heavy_tail,
    "lognormal": lambda n, g: (2 * torch.randn(n, generator=g, dtype=torch.float64)).exp(),
    "two_valued": _two_valued,
    "all_equal": lambda n, g: torch.full((n,), 0.7, dtype=torch.float64),
    "quantised": _quantised,
    "sorted": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64).sort().values,
    "mixed_scales": _mixed_scales,
}


def make_values(
    distribution: str,
    shape: Sequence[int],
    *,
    scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Draw ``shape`` reproducibly from a named distribution, times ``scale``; the same on every device.

    Raises:
        ValueError: ``distribution`` is not a key of ``DISTRIBUTIONS``.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution is {distribution!r}, allowed: {', '.join(DISTRIBUTIONS)}")
    generator = torch.Generator().manual_seed(seed)
    flat = DISTRIBUTIONS[distribution](math.prod(shape), generator) * scale
    return flat.reshape(tuple(shape)).to(device=device, dtype=dtype)


def make_costs(
    kind: str,
    shape: Sequence[int],
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> float | Tensor | None:
    """Costs of a named kind: none, scalar, element (log-uniform in [1/4, 4]) or power_of_two.

    With power_of_two the quotient v/a is exact in every binary float type, so comparisons can be exact.

    Raises:
        ValueError: ``kind`` is none of the four.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    if kind == "none":
        return None
    if kind == "scalar":
        return 2.5
    if kind == "element":
        return (4.0 ** (2 * uniform - 1)).to(device=device, dtype=dtype)
    if kind == "power_of_two":
        return (2.0 ** (uniform * 4).floor()).to(device=device, dtype=dtype)
    raise ValueError(f"kind is {kind!r}, allowed: none, scalar, element, power_of_two")


def cost_tensor(costs: float | Tensor | None, values: Tensor) -> Tensor:
    """Write costs out as a float64 tensor shaped like ``values``."""
    if costs is None:
        return torch.ones_like(values, dtype=torch.float64)
    return torch.as_tensor(costs, dtype=torch.float64, device=values.device).expand(values.shape)


def total_cost(costs: float | Tensor | None, values: Tensor, dim: int | None = None) -> Tensor:
    """Σ a in float64, over ``dim`` or over everything."""
    a = cost_tensor(costs, values)
    return a.sum() if dim is None else a.sum(dim)


# ----------------------------------------------------------------------------------------------------- oracle


def _bisect(logits: Tensor, costs: Tensor, budget: Tensor) -> Tensor:
    """Solve Σ a σ(x + μ) = k for μ along the last dimension (float64)."""
    total = costs.sum(-1, keepdim=True)
    target = torch.log(budget) - torch.log(total - budget)
    # At μ = logit(k/Σa) − max x the sum is at most k, at logit(k/Σa) − min x at least k: a rigorous bracket.
    low = target - logits.amax(-1, keepdim=True)
    high = target - logits.amin(-1, keepdim=True)
    upper_half = budget > total / 2  # there, sum the complement: 1 − m would cancel
    for _ in range(_BISECTIONS):
        mid = low + (high - low) / 2
        if bool(((mid == low) | (mid == high)).all()):
            break
        x = logits + mid
        kept = (costs * torch.sigmoid(x)).sum(-1, keepdim=True)
        dropped = (costs * torch.sigmoid(-x)).sum(-1, keepdim=True)
        too_high = torch.where(upper_half, dropped < total - budget, kept > budget)
        high = torch.where(too_high, mid, high)
        low = torch.where(too_high, low, mid)
    return low + (high - low) / 2


def _root(values: Tensor, costs: Tensor, budget: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return (c, μ) with Σ a σ(β(v/a − c) + μ) = k, c being the v/a nearest the threshold.

    Solved twice, because float64 cannot resolve μ where β v/a is large: the second time relative to c.
    """
    ratio = values / costs
    center = ratio.mean(-1, keepdim=True)
    for _ in range(2):
        mu = _bisect(beta * (ratio - center), costs, budget)
        nearest = (beta * (ratio - center) + mu).abs().argmin(-1, keepdim=True)
        center = ratio.gather(-1, nearest)
    return center, _bisect(beta * (ratio - center), costs, budget)


def oracle_soft_topk(
    values: Tensor,
    budget: float | Tensor,
    costs: float | Tensor | None = None,
    beta: float | Tensor = 1.0,
    dim: int = -1,
) -> Tensor:
    """Soft top-k in float64, equation (1): m = σ(βv/a + μ) with Σ a m = k; differentiable in every argument.

    ``budget`` is a number or broadcasts against ``values`` without ``dim``. At k = 0 the mask is exactly 0,
    at k = Σ a exactly 1.
    """
    v = values.double().movedim(dim, -1)
    a = cost_tensor(costs, values).movedim(dim, -1)
    if v.shape[-1] == 0:
        return v.movedim(-1, dim)
    k = torch.as_tensor(budget, dtype=torch.float64, device=v.device).expand(v.shape[:-1]).unsqueeze(-1)
    b = torch.as_tensor(beta, dtype=torch.float64, device=v.device)
    total = a.sum(-1, keepdim=True)
    inside = (k > 0) & (k < total)
    with torch.no_grad():
        center, mu = _root(v, a, torch.where(inside, k, total / 2), b)
    x = b * (v / a - center) + mu
    m = torch.sigmoid(x)
    slope = (a * m * (1 - m)).sum(-1, keepdim=True).detach()
    # One Newton step leaves the root where it is and carries the implicit derivative; a plateau has none.
    residual = torch.where(slope > 0, k - (a * m).sum(-1, keepdim=True), 0.0)
    newton = residual / slope.clamp_min(torch.finfo(torch.float64).tiny)
    mask = torch.sigmoid(x + newton - newton.detach())
    return torch.where(inside, mask, (k > 0).double().expand_as(mask)).movedim(-1, dim)


def oracle_hard_topk(
    values: Tensor, budget: float | Tensor, costs: float | Tensor | None = None, dim: int = -1
) -> Tensor:
    """Hard top-k (bool): descending v/a, ties to the lowest index, up to the first that no longer fits."""
    v = values.double().movedim(dim, -1)
    a = cost_tensor(costs, values).movedim(dim, -1)
    k = torch.as_tensor(budget, dtype=torch.float64, device=v.device).expand(v.shape[:-1]).unsqueeze(-1)
    order = (v / a).argsort(dim=-1, descending=True, stable=True)
    fits = (a.gather(-1, order).cumsum(-1) <= k).cummin(-1).values if v.shape[-1] else v.bool()
    return torch.zeros_like(v, dtype=torch.bool).scatter(-1, order, fits).movedim(-1, dim)


def oracle_expand_blocks(grid: Tensor, shape: Sequence[int], block_size: int | tuple[int, int]) -> Tensor:
    """Repeat each block's entry over its elements, cut at the weight's edge."""
    rows, cols = (block_size, block_size) if isinstance(block_size, int) else block_size
    if (rows, cols) == (1, 1):
        return grid
    return grid.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: shape[0], : shape[1]]


def oracle_block_sum(elements: Tensor, block_size: int | tuple[int, int]) -> Tensor:
    """Sum elements over each (rows, cols) block of the first two dimensions, in float64."""
    x = elements.double()
    rows, cols = (block_size, block_size) if isinstance(block_size, int) else block_size
    if (rows, cols) == (1, 1):
        return x
    pieces = [[c.sum((0, 1)) for c in r.split(cols, 1)] for r in x.split(rows, 0)]
    return torch.stack([torch.stack(row) for row in pieces])


def oracle_masked_weight(
    weight: Tensor,
    soft: Tensor | None,
    hard: Tensor | None,
    block_size: int | tuple[int, int] = 1,
    *,
    beta: float | Tensor = 1.0,
    costs: float | Tensor = 1.0,
    straight_through: bool = True,
) -> Tensor:
    """ŵ = θ∘m∘h in float64, whose autograd gradient for θ is the local part of equation (2).

    The masks are given numbers; the soft one is made to depend on θ to first order, m + (β s/a)(v(θ) − v).
    """
    theta = weight.double()
    w = theta
    if soft is not None:
        m = soft.detach().double()
        v = oracle_block_sum(theta.abs(), block_size)
        b, a = (torch.as_tensor(x, dtype=torch.float64, device=m.device) for x in (beta, costs))
        slope = b * m * (1 - m) / a
        w = theta * oracle_expand_blocks(m + slope * (v - v.detach()), weight.shape, block_size)
    if hard is None:
        return w
    kept = w * oracle_expand_blocks(hard, weight.shape, block_size).double()
    return w + (kept - w).detach() if straight_through else kept


# ----------------------------------------------------------------------------------------------- error budget


def soft_topk_tolerance(
    mask: Tensor,
    values: Tensor,
    budget: float | Tensor,
    costs: float | Tensor | None,
    beta: float,
    dim: int = -1,
) -> Tensor:
    """Return what a correct mask may differ from the float64 one, entry by entry, beside plain rounding.

    Two terms: a budget met to a relative 1e-6 fixes μ only to 1e-6 k / Σ a s, and on a plateau, where Σ a s
    vanishes, an entry only to 1e-6 k / a; and u = v/a is rounded to the values' type (three roundings:
    quotient, reciprocal, product), which moves the logit βu by as many half ulps.
    """
    a, m = cost_tensor(costs, values), mask.double()
    s = m * (1 - m)
    k = torch.as_tensor(budget, dtype=torch.float64, device=m.device)
    k = k if k.ndim == 0 else k.unsqueeze(dim)
    eps = torch.finfo(values.dtype).eps
    rounding = 0.0 if costs is None else 1.5 * eps * beta * (values.double() / a).abs()
    shift = 1e-6 * k / (a * s).sum(dim, keepdim=True).clamp_min(1e-300) + rounding
    # A finite shift changes the logistic function by at most (e^shift − 1) s, and every entry the same way.
    from_budget = torch.where(shift < 1, torch.expm1(shift.clamp_max(1.0)) * s, 1.0).minimum(1e-6 * k / a)
    from_rounding = (torch.expm1(torch.as_tensor(rounding).clamp_max(50.0)) * s).clamp_max(1.0)
    return from_budget + from_rounding + 4 * eps * m


def plain_soft_topk(
    values: Tensor, budget: float | Tensor, costs: float | Tensor | None, beta: float, dim: int = -1
) -> Tensor:
    """Evaluate σ(βv/a + μ) plainly in the values' dtype, with only μ taken from float64."""
    v = values.movedim(dim, -1)
    a = cost_tensor(costs, values).movedim(dim, -1)
    k = torch.as_tensor(budget, dtype=torch.float64, device=v.device).expand(v.shape[:-1]).unsqueeze(-1)
    if v.shape[-1] == 0:
        return values.clone()
    center, mu = _root(v.double(), a, k, torch.as_tensor(beta, dtype=torch.float64, device=v.device))
    ratio = v if costs is None else v / a.to(v.dtype)
    return torch.sigmoid((beta * (ratio.double() - center) + mu).to(v.dtype)).movedim(-1, dim)


def assert_within_error_budget(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    floor: float | Tensor = 0.0,
    *,
    factor: float = 2.0,
    name: str = "result",
) -> None:
    """Assert |actual − exact| <= factor · max|plain − exact| + floor; exact is float64, plain as actual.

    Raises:
        AssertionError: naming the result, the worst error, its allowance and index; also for NaN and shapes.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if exact.numel() == 0:
        return
    error = (actual.detach().double() - exact.detach()).abs()
    plain_error = (plain.detach().double() - exact.detach()).abs().max()
    allowed = factor * plain_error + torch.as_tensor(floor, device=error.device)
    excess = torch.where(error.isnan(), math.inf, error - allowed).flatten()
    worst = int(excess.argmax())
    if excess[worst] > 0:
        allowance = float(allowed.expand_as(error).flatten()[worst])
        raise AssertionError(
            f"{name}: error {float(error.flatten()[worst]):.3e} at flat index {worst} exceeds its budget "
            f"{allowance:.3e} ({factor:g} x the plain computation's largest error, plus the explained floor)"
        )


def budget_error(
    mask: Tensor, budget: float | Tensor, costs: float | Tensor | None = None, dim: int | None = -1
) -> float:
    """Largest relative budget error |Σ a m − k| / k of the mask as returned, summed in float64."""
    kept_cost = cost_tensor(costs, mask) * mask.double()
    spent = kept_cost.sum() if dim is None else kept_cost.sum(dim)
    k = torch.as_tensor(budget, dtype=torch.float64, device=mask.device)
    return float(((spent - k).abs() / k).max()) if spent.numel() else 0.0
