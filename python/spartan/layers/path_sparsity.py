"""Paths through the gates of all layers: their number, the graph they make, and the weight of a penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["DualAscent", "causal_graph", "path_sparsity"]


def path_sparsity(gates: Sequence[Tensor]) -> Tensor:
    """Mean number of paths from a token to a token through the gates of all layers.

    With A_l the gates of layer l and I for the connection around it:

        P = (A_L + I) ... (A_1 + I),    result = mean of P_ij over i, j and the sets

    P_ij counts the paths from token j to token i. The sum over i and j needs products with vectors only. It is at
    least 1 / tokens, when every gate is closed.

    Args:
        gates: for each layer in the order in which they run, `[..., tokens, tokens]`, as `GatedAttention` returns them.

    Returns:
        0-dim, in the dtype of the gates; differentiable in them.

    Raises:
        ValueError: no layer, or gates that are not square or differ in shape.

    Source: Lei, Schoelkopf and Posner, SPARTAN, arXiv 2411.06890.
    """
    tokens = _tokens(gates)
    # autocast would round the counts to 8 bits
    with torch.autocast(gates[0].device.type, enabled=False):
        paths = torch.ones_like(gates[0][..., :1])  # from all tokens together, to each
        for gate in gates:
            paths = paths + gate @ paths
    return paths.mean() / tokens


def causal_graph(gates: Sequence[Tensor]) -> Tensor:
    """Which tokens reach which through the gates of all layers.

    Args:
        gates: as in `path_sparsity`.

    Returns:
        bool `[..., tokens, tokens]`: [..., i, j] where there is a path from token j to token i. Each reaches itself.

    Raises:
        ValueError: as `path_sparsity`.

    Source: Lei, Schoelkopf and Posner, SPARTAN, arXiv 2411.06890.
    """
    tokens = _tokens(gates)
    reach = torch.eye(tokens, device=gates[0].device).expand(gates[0].shape)
    with torch.no_grad(), torch.autocast(gates[0].device.type, enabled=False):
        for gate in gates:
            reach = ((gate.float() @ reach + reach) > 0).float()
    return reach > 0


def _tokens(gates: Sequence[Tensor]) -> int:
    if len(gates) == 0:
        raise ValueError("gates must have those of one layer at least; got none")
    shapes = [list(gate.shape) for gate in gates]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) < 2 or shapes[0][-1] != shapes[0][-2]:
        raise ValueError(f"gates must be [..., tokens, tokens], of one shape in all layers; got {shapes}")
    return shapes[0][-1]


class DualAscent(nn.Module):
    """A loss plus a penalty whose weight follows a target of the loss: minimise the penalty while loss <= target.

    With a running mean m of the loss, and lambda the multiplier of the constraint:

        m <- decay m + (1 - decay) loss
        lambda <- lambda exp(rate min(m / target - 1, 1))
        total = loss + penalty / lambda

    The weight 1 / lambda grows while the loss is below its target and falls while it is above. It starts at the lower
    of its limits: the model learns first, and the penalty comes when the target is reached.

    Args:
        target: of the loss, above 0.
        rate: most that log(lambda) changes by in a step, above 0.
        decay: of the running mean, from 0 up to 1.
        limits: least and most of the weight, 0 < least <= most.

    Raises:
        ValueError: a setting out of range.

    Source: Rezende and Viola, Taming VAEs (GECO), arXiv 1810.00597; for path sparsity: Lei, Schoelkopf and Posner,
    SPARTAN, arXiv 2411.06890.
    """

    def __init__(
        self, target: float, *, rate: float = 0.02, decay: float = 0.9, limits: tuple[float, float] = (1e-4, 1e4)
    ) -> None:
        super().__init__()
        if not 0 < target < math.inf:
            raise ValueError(f"target must be positive and finite; got {target}")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be positive and finite; got {rate}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be from 0 up to 1, 1 excluded; got {decay}")
        if not 0 < limits[0] <= limits[1] < math.inf:
            raise ValueError(f"limits must be 0 < least <= most, finite; got {limits}")
        self.target, self.rate, self.decay, self.limits = target, rate, decay, limits
        self.log_weight: Tensor
        self.average: Tensor
        self.register_buffer("log_weight", torch.tensor(math.log(limits[0])))
        self.register_buffer("average", torch.tensor(math.inf))

    @property
    def weight(self) -> Tensor:
        """1 / lambda, 0-dim float32."""
        return self.log_weight.exp()

    def forward(self, loss: Tensor, penalty: Tensor) -> Tensor:
        """Return loss + weight * penalty, 0-dim; in training, the weight takes a step first.

        Args:
            loss: 0-dim, what `target` is for.
            penalty: 0-dim, such as `path_sparsity`.

        Raises:
            ValueError: a loss or penalty that is not 0-dim.
        """
        for name, value in (("loss", loss), ("penalty", penalty)):
            if value.dim():
                raise ValueError(f"{name} must be 0-dim; got {list(value.shape)}")
        if self.training:
            with torch.no_grad():
                now = loss.detach().to(self.average.dtype)
                mean = torch.where(self.average.isinf(), now, self.decay * self.average + (1 - self.decay) * now)
                self.average.copy_(torch.where(now.isfinite(), mean, self.average))  # a step that overflowed is none
                step = self.rate * (self.average / self.target - 1).clamp_max(1)
                self.log_weight.sub_(step).clamp_(math.log(self.limits[0]), math.log(self.limits[1]))
        return loss + self.weight * penalty

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return f"target={self.target:g}, rate={self.rate:g}, decay={self.decay:g}, limits={self.limits}"
