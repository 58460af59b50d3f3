"""Differentiable top-k by rows as PyTorch users write or install it: the same relaxation by other means, and others.

`peers` builds each, runs it on a few rows and checks what it promises; one that cannot run is a line with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench.case import Peer

OTHER = " (another relaxation)"
_BISECTIONS = 50
_PROBE_ROWS = 8
_BUDGET = 1e-2  # relative; bfloat16 rounds every entry by up to 4e-3


def sigmoid_bisection(values: Tensor, k: float, beta: float) -> Tensor:
    """Return sigmoid(beta v + mu) along the last dimension, mu by a fixed number of bisections on the device."""
    x = beta * values
    with torch.no_grad():
        low, high = -x.amax(-1, keepdim=True) - 20, -x.amin(-1, keepdim=True) + 20
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = torch.sigmoid(x + middle).sum(-1, keepdim=True) > k
            high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    return torch.sigmoid(x + (low + high) / 2)


def sinkhorn(values: Tensor, k: float, beta: float) -> Tensor:
    """Fixed point mu += log(k / sum m), stopped when no row moves by 1e-3."""
    x = beta * values
    log_k = torch.tensor(k, dtype=values.dtype, device=values.device).log()
    mu = torch.zeros_like(values[..., :1])
    for _ in range(100):
        step = log_k - logsigmoid(x + mu).logsumexp(-1, keepdim=True)
        mu = mu + step
        if step.abs().max().item() < 1e-3:
            break
    return torch.sigmoid(x + mu)


def lapsum(values: Tensor, k: float, beta: float) -> Tensor:
    """Soft top-k by a sum of Laplace distributions: m_i = F(beta v_i - b), b such that sum m = k, in closed form.

    With x = beta v in descending order and j entries above b, sum m = j - A e^b / 2 + B e^-b / 2, where A sums e^-x
    over those above and B sums e^x over the others: a quadratic in e^b, once a search has found j.
    The gradient is that of the implicit function.

    Source: Struski, Bednarczyk, Podolak, Tabor, "LapSum", ICML 2025, sections 3 and 4.
    """
    x = beta * values
    with torch.no_grad():
        b = _lapsum_root(x, k)
        density = torch.exp(-(x - b).abs()) / 2
    mass = _laplace_cdf(x - b).sum(-1, keepdim=True)
    # one Newton step of size nought leaves the root and carries its derivative
    return _laplace_cdf(x - b - (mass - mass.detach()) / density.sum(-1, keepdim=True))


def _laplace_cdf(x: Tensor) -> Tensor:
    half = torch.exp(-x.abs()) / 2
    return torch.where(x < 0, half, 1 - half)


def _lapsum_root(x: Tensor, k: float) -> Tensor:
    n = x.shape[-1]
    ordered = x.sort(-1, descending=True).values
    above = (-ordered).logcumsumexp(-1)  # log of A for j = 1 .. n
    below = ordered.flip(-1).logcumsumexp(-1).flip(-1)  # log of B for j = 0 .. n - 1
    count = torch.arange(1, n + 1, dtype=x.dtype, device=x.device)
    # sum m with b at entry j - 1, which may stand on either side of b
    at_entries = count - torch.exp(above + ordered) / 2 + (torch.exp(below - ordered) - 1) / 2
    j = torch.searchsorted(at_entries, torch.full_like(x[..., :1], k))  # entries above b
    reference = ordered.gather(-1, j.clamp_max(n - 1))
    a = torch.where(j > 0, torch.exp(above.gather(-1, (j - 1).clamp_min(0)) + reference), 0.0)
    c = torch.where(j < n, torch.exp(below.gather(-1, j.clamp_max(n - 1)) - reference), 0.0)
    rest = j.to(x.dtype) - k
    root = (rest.square() + a * c).sqrt()
    # a y^2 - 2 rest y - c = 0 for y = e^(b - reference), in the form that does not cancel
    y = torch.where(rest > 0, (rest + root) / a, c / (root - rest))
    return reference + y.log()


def entmax_budget(values: Tensor, k: float, beta: float) -> Tensor:
    """The package entmax: Euclidean projection onto 0 <= m <= 1, sum m = k."""
    from entmax import budget_bisect

    return budget_bisect(beta * values, budget=k, dim=-1)


def torchsort_rank(values: Tensor, k: float, beta: float) -> Tensor:
    """The package torchsort: soft ranks, cut to [0, 1] at rank n - k."""
    from torchsort import soft_rank

    return (soft_rank(values, regularization_strength=1 / beta) - (values.shape[-1] - k)).clamp(0, 1)


def softtorch_topk(values: Tensor, k: float, beta: float) -> Tensor:
    """The package softtorch, which has not been run yet: it is listed, not timed."""
    version = ".".join(str(part) for part in sys.version_info[:2])
    raise RuntimeError(f"softtorch needs Python 3.12 or newer, this is {version}; not tried yet")


Relaxation = Callable[[Tensor, float, float], Tensor]
# name -> function, and whether it promises to hold the budget
RELAXATIONS: dict[str, tuple[Relaxation, bool]] = {
    "Sinkhorn": (sinkhorn, False),
    "sigmoid bisection": (sigmoid_bisection, True),
    f"LapSum{OTHER}": (lapsum, True),
    f"entmax budget_bisect{OTHER}": (entmax_budget, True),
    f"torchsort soft_rank{OTHER}": (torchsort_rank, False),
    f"softtorch{OTHER}": (softtorch_topk, True),
}


def peers(example: Tensor, k: float, beta: float, *, gradient: bool = False) -> dict[str, Peer | str]:
    """Every relaxation, ready to be called with values [rows, n], or why it is missing.

    Args:
        example: values as the peers will get them.
        k: the budget of a row.
        beta: the sharpness.
        gradient: forward and backward instead: called with values that require a gradient, and the mask's gradient.
    """
    return {name: _ready(run, holds, example, k, beta, gradient) for name, (run, holds) in RELAXATIONS.items()}


def _ready(run: Relaxation, holds: bool, example: Tensor, k: float, beta: float, gradient: bool) -> Peer | str:
    leaf = example.detach()[:_PROBE_ROWS].clone().requires_grad_()
    try:
        mask = run(leaf, k, beta)
        (slope,) = torch.autograd.grad(mask.square().sum(), leaf)
    except ImportError as error:
        return f"{error.name or error} is not installed"
    except Exception as error:
        # whatever a package dies of on this device, dtype or version is the line that the reader gets
        first = (str(error).strip().splitlines() or ["without a message"])[0][:120]
        return first if type(error) is RuntimeError else f"{type(error).__name__}: {first}"
    if not bool(mask.isfinite().all() and slope.isfinite().all()):
        return "its result is not finite"
    missed = float((mask.detach().double().sum(-1) / k - 1).abs().max())
    if holds and missed > _BUDGET:
        return f"it misses its budget by {missed:.0%}"
    if gradient:
        return lambda values, upstream: torch.autograd.grad(run(values, k, beta), values, upstream)[0]

    def forward(values: Tensor) -> Tensor:
        with torch.no_grad():
            return run(values, k, beta)

    return forward
