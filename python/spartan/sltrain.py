"""SLTrain: linear layers whose weight is a product of two thin factors plus a sparse matrix on a fixed support."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spartan.methods.base import require_number
from spartan.methods.static_random import generator_at, require_seed
from spartan.nn.selection import Selector, find_weights, select_linear_layers
from spartan.saving.packing import replace_modules
from spartan_kernels.ops.masked_matmul import in_autocast

__all__ = ["SLTrainLinear", "merge_sltrain", "to_sltrain"]


class SLTrainLinear(nn.Module):
    """y = x W^T + b with W = (alpha / r) B A + S, of which B, A and the values of S on a fixed random support train.

    The parameters are r (in + out) + nnz(S) numbers, and so are their gradients and the optimizer's moments. W is
    formed for each product and kept for none: with G = dL/dW, formed once in the backward,

        dL/dB = (alpha / r) G A^T,   dL/dA = (alpha / r) B^T G,   dL/dS = G on the support.

    Args:
        in_features, out_features: as in `nn.Linear`.
        rank: r, from 1 to the smaller of both.
        density: nnz(S) / (in out), in [0, 1].
        alpha: weight of the low-rank part, above 0. Published: 32 for models of 60 M to 130 M parameters, 16 for 350 M,
            8 for 1 B and more.
        bias: whether there is b.
        seed: of the support, which does not touch PyTorch's global generator; weights begin as PyTorch's would.
        device, dtype: of the parameters.

    Attributes:
        factor_b: B [out, r], zero at first. factor_a: A [r, in], uniform as in `nn.Linear`.
        values: of S [nnz], uniform in +-1 / sqrt(in) at first. bias: parameter or None.
        positions: buffer [nnz], where the values are in W read row by row, ascending; int32 where that suffices.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range, named.

    Source: Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    NeurIPS 2024, arXiv 2406.02214.
    """

    positions: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float = 0.03,
        alpha: float = 16.0,
        bias: bool = True,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _require_settings(rank, density, alpha, seed)
        if rank > min(in_features, out_features):
            raise ValueError(f"rank must be at most {min(in_features, out_features)}, the smaller side; got {rank}")
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, float(alpha)
        total = in_features * out_features
        positions = _draw_support(round(density * total), total, generator_at(seed, 0))
        self.factor_b = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.factor_a = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(len(positions), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("positions", positions.to(device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew on the same support: W = S."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.zeros_(self.factor_b)
        nn.init.kaiming_uniform_(self.factor_a, a=math.sqrt(5))
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> torch.Tensor:
        """W [out, in], differentiable in the parameters."""
        low_rank = self.factor_b @ self.factor_a * (self.alpha / self.rank)
        return low_rank.reshape(-1).index_add(0, self.positions, self.values).view_as(low_rank)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x W^T + b."""
        x = in_autocast(input)
        parts = self.factor_b, self.factor_a, self.values, self.positions
        with torch.autocast(x.device.type, enabled=False):
            y: torch.Tensor = _Product.apply(x, *parts, self.alpha / self.rank)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        density = len(self.values) / (self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, density={density:.3g}, alpha={self.alpha:g}"


class _Product(torch.autograd.Function):
    """x W^T, which saves the parts of W in place of W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, b, a, values, positions)
        ctx.scale = scale
        return functional.linear(x, _dense(b, a, values, positions, scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, b, a, values, positions = ctx.saved_tensors
        dx = db = da = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = grad @ _dense(b, a, values, positions, ctx.scale).to(grad.dtype)
        if any(ctx.needs_input_grad[1:4]):
            whole = (grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1])).to(b.dtype)
            db = (whole @ a.mT).mul_(ctx.scale)
            da = (b.mT @ whole).mul_(ctx.scale)
            dvalues = whole.view(-1).index_select(0, positions)
        return dx, db, da, dvalues, None, None


def to_sltrain(
    model: nn.Module,
    rank: int,
    density: float = 0.03,
    alpha: float = 16.0,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replace linear layers by `SLTrainLinear`, in place, for training from scratch.

    The weights that a layer had are not used; its bias is. Make the optimizer afterwards: the parameters are new ones.
    This is no method of `Sparsifier`, which masks the weights that a model has; both can be used together.

    Args:
        model: with layers of the exact type `nn.Linear`.
        rank: r, for all layers.
        density: of S, as for `SLTrainLinear`.
        alpha: as for `SLTrainLinear`.
        include: names of weights, types or functions of (name, module), as for `Sparsifier`; by default every
            `nn.Linear` but the last, the head, that shares its weight with nothing and is called by its owner.
        exclude: the same, taken from the choice.
        seed: of the supports, one of its own for each layer.

    Returns:
        `model`, or its replacement where it is an `nn.Linear` itself.

    Raises:
        TypeError, ValueError: as `SLTrainLinear`; nothing to replace, or `include` chooses what cannot be.
    """
    _require_settings(rank, density, alpha, seed)
    replacements = {}
    for index, candidate in enumerate(select_linear_layers(model, find_weights(model), include, exclude)):
        layer = candidate.uses[0].module
        replacements[id(layer)] = _replacing(layer, rank, density, alpha, seed + index)
    return replace_modules(model, replacements)


def merge_sltrain(model: nn.Module) -> nn.Module:
    """Replace each `SLTrainLinear` by the `nn.Linear` with its weight W, in place, for tools that know only that.

    A model that stays as it is keeps the factors, and `save_pretrained` writes them: that is the smaller file.

    Returns:
        `model`, or its replacement where it is an `SLTrainLinear` itself.
    """
    replacements: dict[int, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, SLTrainLinear):
            merged = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            merged.weight = nn.Parameter(layer.weight.detach())
            merged.bias = layer.bias  # type: ignore[assignment]  # None is allowed
            replacements[id(layer)] = merged.train(layer.training)
    return replace_modules(model, replacements)


def _replacing(layer: Any, rank: int, density: float, alpha: float, seed: int) -> SLTrainLinear:
    kind = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    sizes = layer.in_features, layer.out_features, rank, density, alpha
    new = SLTrainLinear(*sizes, bias=False, seed=seed, **kind)
    new.bias = layer.bias
    return new.train(layer.training)


def _dense(
    b: torch.Tensor, a: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    weight = (b @ a).mul_(scale)
    weight.view(-1).index_add_(0, positions, values)
    return weight


def _draw_support(count: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """`count` different numbers below `total`, each set of them as likely, ascending; no memory of order `total`."""
    if 2 * count > total:
        rest = _draw_support(total - count, total, generator)
        among = rest.new_ones(total, dtype=torch.bool).index_fill_(0, rest.long(), False)
        return _smallest(among.nonzero()[:, 0], total)
    drawn = torch.empty(0, dtype=torch.int64, device=generator.device)
    while len(drawn) < count:  # the first `count` different ones of one long series of draws
        more = torch.randint(total, (count - len(drawn),), generator=generator, device=generator.device)
        drawn = torch.cat([drawn, more]).unique()
    return _smallest(drawn, total)


def _smallest(positions: torch.Tensor, total: int) -> torch.Tensor:
    return positions.to(torch.int32 if total <= 2**31 else torch.int64)


def _require_settings(rank: Any, density: Any, alpha: Any, seed: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int; got {type(rank).__name__}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")
    require_number("density", density, 0.0, 1.0)
    require_number("alpha", alpha, 0.0)
    if alpha == 0:
        raise ValueError("alpha must be above 0; got 0")
    require_seed(seed)
