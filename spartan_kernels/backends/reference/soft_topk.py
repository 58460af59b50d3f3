"""Soft top-k in plain PyTorch: one bracketed Halley iteration per row, in the paper's quantities.

    m_i = sigmoid(beta (u_i - c) + d),   u = v / a,   sum_i a_i m_i = k

The unknown is the threshold t = c - d / beta. The centre c is t rounded to the values' dtype, so u - c loses nothing
near the threshold however large beta is; d carries the rest. The search keeps t in two parts for the same reason: by
entries of 1e13 one float64 has no digits left for the fraction of 1 / beta that decides how much of them is kept.
An entry of -inf is masked: it takes part as one of value and cost 0, and its mask is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spartan_kernels.arguments import SMALLEST_BETA
from spartan_kernels.backends.reference.hard_topk import select
from spartan_kernels.backends.reference.masked_weight import block_scores
from spartan_kernels.backends.reference.survey import Survey, ratio, survey
from spartan_kernels.blocks import score_list
from spartan_kernels.groups import gather, summed
from spartan_kernels.operands import SoftTopk, SoftTopkBackward, SoftTopkGlobal, SoftTopkGlobalBackward, SolveMasks

MAX_STEPS = 300
_FINEST_LOGIT = 1e-16  # a bracket that moves no logit by more is resolved
_NEAR = 16.0  # ends of one sign within this factor of one another are halved as numbers all the same
_WIDE = 2.0**30  # a bracket so many times wider than 1 / beta is halved in the exponent


class _Threshold(NamedTuple):
    """t = at + rest of each row, float64."""

    at: torch.Tensor
    rest: torch.Tensor

    def plus(self, step: torch.Tensor) -> _Threshold:
        step = self.rest + step
        at = self.at + step
        gone = at - self.at
        return _Threshold(at, (self.at - (at - gone)) + (step - gone))

    def minus(self, other: _Threshold) -> torch.Tensor:
        return (self.at - other.at) + (self.rest - other.rest)


def _at(value: torch.Tensor) -> _Threshold:
    return _Threshold(value, torch.zeros_like(value))


def _where(condition: torch.Tensor, one: _Threshold, other: _Threshold) -> _Threshold:
    return _Threshold(*(torch.where(condition, a, b) for a, b in zip(one, other, strict=True)))


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Bits of float64 numbers as int64 in their order, and back: it is its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def _middle(low: _Threshold, high: _Threshold, beta: torch.Tensor, turn: int) -> _Threshold:
    """Half way. Where the bracket spans many magnitudes (-1e38 among entries of 1), by turns in the exponent.

    These are: half way through the doubles, and half way in the exponent of the distance to either end.
    """
    width = high.minus(low)
    wide = width > _WIDE / beta
    half = low.plus(torch.where(torch.isfinite(width), width / 2, 0.0))
    if not bool(wide.any()):
        return half
    if turn % 3:
        distance = (width / 2).sqrt() * (1 / beta).sqrt()
        return _where(wide, low.plus(distance) if turn % 3 == 1 else high.plus(-distance), half)
    near = (low.at.sign() == high.at.sign()) & (width <= _NEAR * torch.minimum(low.at.abs(), high.at.abs()))
    a, b = (_ordered(end.at.contiguous().view(torch.int64)) for end in (low, high))
    doubles = _ordered((a >> 1) + (b >> 1) + (a & b & 1)).view(torch.float64)
    return _where(wide & ~near, _at(doubles), half)


def _position(
    u: torch.Tensor, threshold: _Threshold, beta: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre c and shift d of threshold t: c the nearest representable value inside the data's range."""
    centre = torch.minimum(torch.maximum(threshold.at, bounds[0]), bounds[1]).to(u.dtype).to(torch.float64)
    shift = beta * ((centre - threshold.at) - threshold.rest)
    return centre, shift


def _logits(u: torch.Tensor, centre: torch.Tensor, shift: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return beta.to(u.dtype) * (u - centre.to(u.dtype)[:, None]) + shift.to(u.dtype)[:, None]


def solve(
    u: torch.Tensor, a: torch.Tensor, hard: torch.Tensor, known: Survey, beta: torch.Tensor, group: str
) -> torch.Tensor:
    """(c, d) of each row, float64 [rows, 2], for u = v / a [rows, n], costs a broadcastable to it and the hard mask."""
    masked = u == -torch.inf
    u, a = u.masked_fill(masked, 0.0), torch.where(masked, 0.0, a)
    target = torch.log(known.budget) - torch.log(known.total - known.budget)
    target = torch.where((known.total == 0) & (known.budget == 0), -torch.inf, target)  # everything is masked
    centre = torch.zeros_like(target)
    bounds = known.lowest, known.highest
    if float(beta) < SMALLEST_BETA or bool((known.lowest > known.highest).all()):  # flat, or nothing on any rank
        return torch.stack([centre, target], -1)
    beta = beta.to(torch.float64)
    # At these thresholds every logit is on one side of the target's, whatever the values: a rigorous bracket.
    low, high = (_at(bound).plus(-target / beta) for bound in bounds)
    interior = torch.isfinite(target)
    t = _at(torch.where(interior, _start(u, hard, known, group), 0.0))
    done = ~interior
    tolerance = 1e-14 if u.dtype == torch.float64 else 1e-8
    previous = torch.full_like(t.at, torch.inf)
    for turn in range(MAX_STEPS):
        x = _logits(u, *_position(u, t, beta, bounds), beta)
        kept, dropped = torch.sigmoid(x), torch.sigmoid(-x)
        weights = a.to(torch.float64)
        sums = torch.stack(
            [
                (weights * kept).sum(-1),
                (weights * dropped).sum(-1),
                (weights * kept * dropped).sum(-1),
                (weights * kept * dropped * (dropped - kept).to(torch.float64)).sum(-1),
            ]
        )
        step, residual = _halley(summed(sums, group), target, beta)
        low, high = _where(residual > 0, t, low), _where(residual < 0, t, high)
        middle, ahead = _middle(low, high, beta, turn), t.plus(step)
        # on a plateau with a distant edge Halley's steps are about 2 / beta each, whatever is left to go
        trusted = (ahead.minus(low) > 0) & (high.minus(ahead) > 0) & (residual.abs() <= previous / 2)
        previous = residual.abs()
        resolved = ((middle.at == low.at) | (middle.at == high.at)) & (beta * high.minus(low) <= _FINEST_LOGIT)
        done = done | (previous <= tolerance) | resolved
        t = _where(done, t, _where(trusted, ahead, middle))
        if bool(done.all()):
            break
    centre, shift = _position(u, t, beta, bounds)
    return torch.stack([torch.where(interior, centre, 0.0), torch.where(interior, shift, target)], -1)


def _halley(sums: torch.Tensor, target: torch.Tensor, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Halley's step for f(t) = logit(S / sum a) - logit(k / sum a), and f; not finite where S is saturated."""
    kept, dropped, slope, curvature = sums
    total = kept + dropped
    first = -beta * slope
    second = beta.square() * curvature
    residual = torch.log(kept) - torch.log(dropped) - target
    weight = total / (kept * dropped)
    derivative = first * weight
    second_derivative = second * weight - first.square() * weight.square() * (dropped - kept) / total
    step = -2 * residual * derivative / (2 * derivative.square() - residual * second_derivative)
    return step, residual


def _start(u: torch.Tensor, hard: torch.Tensor, known: Survey, group: str) -> torch.Tensor:
    """The hard threshold of each row."""
    infinite = u.new_full((u.shape[0], 1), torch.inf)  # an empty part has no least entry
    lowest = torch.cat([torch.where(hard, u, torch.inf), infinite], -1).amin(-1).to(torch.float64)
    lowest = gather(lowest, group).amin(0)
    return torch.where(torch.isfinite(lowest), lowest, known.highest)


def _mask(u: torch.Tensor, threshold: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    poison = torch.where(threshold[:, 1:].isnan(), torch.nan, 0.0).to(u.dtype)
    return torch.where(u == -torch.inf, poison, torch.sigmoid(_logits(u, threshold[:, 0], threshold[:, 1], beta)))


def soft_topk_forward(o: SoftTopk, group: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """m and (c, d) for each row of values [rows, n]."""
    u, a = ratio(o.values, o.costs)
    known = survey(o.values, u, o.costs, o.budget, o.beta, group)
    threshold = solve(u, a, select(u, a, known.allowance, group), known, o.beta, group)
    return _mask(u, threshold, o.beta).to(o.values.dtype), threshold


def soft_topk_backward(
    o: SoftTopkBackward, group: str = ""
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row).

    D = sum a s, r = sum g s / D:  dv = beta s (g / a - r),  dk = r,
    da = -(g - a r) s beta v / a^2 - r m,  dbeta = sum (g - a r) s v / a.
    """
    u, a = ratio(o.values, o.costs)
    masked = u == -torch.inf
    u, g = u.masked_fill(masked, 0.0), o.grad.to(u.dtype).masked_fill(masked, 0.0)
    x = _logits(u, o.threshold[:, 0], o.threshold[:, 1], o.beta)
    m = torch.sigmoid(x).masked_fill(masked, 0.0)
    s = m * torch.sigmoid(-x)
    wide = torch.float64
    sums = torch.stack([(g * s).sum(-1, dtype=wide), (a * s).sum(-1, dtype=wide)])
    numerator, denominator = summed(sums, group)
    r = torch.where(denominator > 0, numerator / denominator, 0.0)
    r_ = r.to(u.dtype)[:, None]
    b = o.beta.to(u.dtype)
    grad_values = b * s * (g / a - r_)
    # sum (g - a r) s vanishes, so u may be measured from the threshold: nothing cancels where values are far from zero
    grad_beta = ((g - a * r_) * s * (u - o.threshold[:, :1].to(u.dtype))).sum(-1, dtype=wide)
    grad_costs = -(g - a * r_) * s * b * u / a - r_ * m if o.cost_grad else o.values.new_empty(0)
    return grad_values.to(o.values.dtype), grad_costs.to(o.values.dtype), r, summed(grad_beta, group)


def _concatenated(values: list[torch.Tensor], costs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    row = torch.cat([v.reshape(-1) for v in values])[None]
    if not costs:
        return row, None
    return row, torch.cat([c.expand_as(v).reshape(-1) for v, c in zip(values, costs, strict=True)])[None]


def _split(row: torch.Tensor, values: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = row[0].split([v.numel() for v in values])
    return [part.reshape(v.shape).clone() for part, v in zip(parts, values, strict=True)]


def soft_topk_global_forward(o: SoftTopkGlobal) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m for a list that shares one budget: one row, concatenated."""
    row, a = _concatenated(o.values, o.costs)
    mask, threshold = soft_topk_forward(SoftTopk(row, o.budget[None], a, o.beta), o.group)
    return _split(mask, o.values), threshold[0]


def soft_topk_global_backward(
    o: SoftTopkGlobalBackward,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta of a list that shares one budget."""
    row, a = _concatenated(o.values, o.costs)
    grad, _ = _concatenated(o.grads, [])
    grad_values, grad_costs, r, grad_beta = soft_topk_backward(
        SoftTopkBackward(grad, row, o.threshold[None], a, o.beta, o.cost_grad), o.group
    )
    return _split(grad_values, o.values), _split(grad_costs, o.values) if o.cost_grad else [], r[0], grad_beta[0]


def solve_masks_(o: SolveMasks) -> None:
    """Soft and hard mask of a training step, in place."""
    values, absolute = score_list(o, block_scores)
    row, costs_row = _concatenated(values, o.costs)
    row = row.abs() if absolute else row
    u, a = ratio(row, costs_row)
    known = survey(row, u, costs_row, o.budget[None], o.beta, o.group)
    kept = select(u, a, known.allowance, o.group)
    threshold = solve(u, a, kept, known, o.beta, o.group)
    mask = _mask(u, threshold, o.beta).to(row.dtype)
    for source, targets in ((mask, o.soft), (kept, o.hard)):
        if targets:
            for part, target in zip(_split(source, values), targets, strict=True):
                target.copy_(part)
    if not o.soft:
        o.state[6:] = threshold[0]
    centre, shift = threshold[0]
    o.state[1], o.state[3] = o.state[0].clone(), o.state[2].clone()
    # the largest value not wholly kept; when all are, there is none and the last one stands
    dropped = torch.cat([u.masked_fill(kept, -torch.inf).flatten(), u.new_full((1,), -torch.inf)])
    runs_out = gather(dropped.amax().to(torch.float64), o.group).amax()
    o.state[2] = torch.where(torch.isfinite(runs_out), runs_out, o.state[2])
    soft_threshold = centre - shift / o.beta
    o.state[0] = torch.where(torch.isfinite(soft_threshold), soft_threshold, o.state[2])
    o.state[4] += 1
