"""Gates of blocks or of operations, chosen under a budget of cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from spartan.functional import hard_topk, soft_topk

__all__ = ["KnapsackGate"]

_KINDS = ("hard", "soft", "scaled")
_FIRST_DEVIATION = 0.01  # of free scores: no block is preferred, and few are tied


class KnapsackGate(nn.Module):
    """Gates of n blocks whose costs stay within a budget: for each input, for each client, or for the network.

    With scores s and costs a, m_i = sigmoid(beta s_i + mu), with mu such that sum_i a_i m_i = k, and h_i = 1 for the
    blocks of largest score until the next one would exceed k. A score is of value per cost, so with dm = m (1 - m)
    and r = sum_i dm_i g_i / sum_i dm_i a_i the gradient is dL/ds_i = beta dm_i (g_i - r a_i): a block gains score where
    it is worth more than its cost at the price r, which is dL/dk.

    Multiply the output of block i by gate i, as in `x + gates[..., i, None] * block(x)`, or give `masked_linear` the
    gates of one row as those of the blocks of a weight: it multiplies none whose gate is 0.

    Args:
        costs: a > 0, one for each block, in any unit: parameters, operations, seconds.
        scores: module that makes the scores `[..., n]` of what `forward` gets: `nn.Linear(features, n)` for each input,
            `nn.Embedding(clients, n)` for each client. None: n trained scores of the whole network.
        budget: k as a fraction of the sum of all costs, in [0, 1].
        beta: sharpness of m, at least 0.
        kind: what the gates are. "hard": h, with the gradient of m. "soft": m, which keeps the budget but is never 0.
            "scaled": h m, differentiated where h is 1, and through mu.

    Attributes:
        costs: float32 `[n]`, saved with the parameters.
        free: the trained scores `[n]` of the whole network, or None.

    Raises:
        ValueError: costs that are not n positive numbers, a budget outside [0, 1], beta below 0, an unknown kind.

    Source: Chen et al., "Efficient Personalized Federated Learning via Sparse Model-Adaptation" (pFedGate), ICML 2023,
        arXiv 2305.02776; the solution of its knapsack is Tai, Tian, Lim, "Spartan", NeurIPS 2022, section 3.
    """

    costs: torch.Tensor
    free: torch.Tensor

    def __init__(
        self,
        costs: Sequence[float] | torch.Tensor,
        scores: nn.Module | None = None,
        *,
        budget: float = 0.5,
        beta: float = 4.0,
        kind: str = "hard",
    ) -> None:
        super().__init__()
        price = torch.as_tensor(costs, dtype=torch.float32).detach().clone()
        if price.dim() != 1 or not len(price) or not bool(((price > 0) & price.isfinite()).all()):
            raise ValueError(f"costs must be positive numbers, one for each block; got {costs}")
        if not 0 <= budget <= 1:
            raise ValueError(f"budget must be a fraction of the sum of the costs, in [0, 1]; got {budget}")
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be at least 0 and finite; got {beta}")
        if kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}; got {kind!r}")
        self.budget, self.beta, self.kind = budget, beta, kind
        self.register_buffer("costs", price)
        self.scores = scores
        free = nn.Parameter(_FIRST_DEVIATION * torch.randn(len(price))) if scores is None else None
        self.register_parameter("free", free)

    def forward(self, x: torch.Tensor | None = None, budget: float | torch.Tensor | None = None) -> torch.Tensor:
        """Gates of the blocks.

        Args:
            x: what `scores` takes; None with trained scores of the whole network.
            budget: in place of the module's, a fraction in [0, 1]: a number, or a tensor with one for each row, which
                gets a gradient. Trained scores make a row for each.

        Returns:
            Gates `[..., n]`, float32 (float64 where the scores are), differentiable in scores and budget.

        Raises:
            TypeError: x without a module that makes scores, or none for one.
            ValueError: scores that are not n for each row, a budget of a wrong shape or outside [0, 1]; a GPU is not
                asked for the latter: its row comes out as NaN.
        """
        values = self._scores(x)
        fraction = self.budget if budget is None else budget
        if isinstance(fraction, torch.Tensor):
            if self.scores is None:
                values = values.expand(*fraction.shape, -1)
            fraction = fraction.to(device=values.device, dtype=torch.float64)
        elif not 0 <= fraction <= 1:
            raise ValueError(f"budget must be a fraction of the sum of the costs, in [0, 1]; got {fraction}")
        costs = self.costs.to(values.dtype)
        values, k = values * costs, fraction * costs.double().sum()
        if self.kind == "scaled":
            return soft_topk(values, k, costs, self.beta) * hard_topk(values, k, costs)
        return soft_topk(values, k, costs, self.beta, straight_through=self.kind == "hard")

    def spent(self, gates: torch.Tensor) -> torch.Tensor:
        """Cost of the blocks whose gates are not 0, as a fraction of all, `[...]`; without a gradient."""
        costs = self.costs.double()
        return ((gates != 0) * costs).sum(-1) / costs.sum()

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"{len(self.costs)} blocks, budget={self.budget}, beta={self.beta}, kind={self.kind!r}"

    def _scores(self, x: torch.Tensor | None) -> torch.Tensor:
        if (x is None) != (self.scores is None):
            takes = "makes its scores of x" if self.scores is not None else "has scores of its own and takes no x"
            raise TypeError(f"x must fit scores: this gate {takes}; got {'none' if x is None else type(x).__name__}")
        scores = self.free if self.scores is None else self.scores(x)
        if scores.shape[-1:] != self.costs.shape:
            raise ValueError(f"scores must be [..., {len(self.costs)}], one for each cost; got {tuple(scores.shape)}")
        return scores.double() if scores.dtype == torch.float64 else scores.float()
