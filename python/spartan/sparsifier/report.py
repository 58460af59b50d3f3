"""Where the zeros of a model are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from spartan.budgets import LayerCost
from spartan.distributed import own_class
from spartan.masks import MaskedTensor
from spartan.nn.masked_attribute import plain_class
from spartan.saving.tables import text_table

__all__ = ["LayerReport", "Report", "dense_products", "hidden_matrices", "kept_fractions", "layer_reports", "stability"]


@dataclass(frozen=True)
class LayerReport:
    """A masked weight.

    Attributes:
        name, shape: of the weight. block_size: (rows, columns) of its blocks.
        sparsity: fraction of zeros in it.
        cost_share: its part of what the model's masked weights cost now, in the unit of the sparsifier's costs.
        churn: 1 - (blocks kept then and now) / (blocks kept then or now), since the last report; None without one.
    """

    name: str
    shape: tuple[int, ...]
    block_size: tuple[int, int]
    sparsity: float
    cost_share: float
    churn: float | None


@dataclass(frozen=True, repr=False)
class Report:
    """The masked weights of a model at a step, and what is not masked; `print` shows it as a table.

    Attributes:
        method: its name. step, total_steps: optimizer steps made, and of the whole training.
        sparsity: fraction of zeros among the parameters that the sparsifier counts.
        beta: sharpness of the soft masks, in the method's units, or None. frozen: whether the masks are fixed.
        rows: one for each masked weight. skipped: why the other parameters are not masked, by name.
        no_head: why no Linear is taken for a classifier head, which stays dense by default; None where one is.
        dense_products: the weights masked by blocks whose products are dense all the same, with the class of each.
    """

    method: str
    step: int
    total_steps: int
    sparsity: float
    beta: float | None
    frozen: bool
    rows: tuple[LayerReport, ...]
    skipped: Mapping[str, str]
    no_head: str | None = None
    dense_products: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        state = "masks fixed" if self.frozen else "" if self.beta is None else f"beta {self.beta:.3g}"
        parts = [f"{self.method}, step {self.step:,} of {self.total_steps:,}", f"{self.sparsity:.2%} zeros", state]
        rows = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                "x".join(map(str, row.block_size)),
                f"{row.sparsity:.2%}",
                f"{row.cost_share:.1%}",
                "" if row.churn is None else f"{row.churn:.1%}",
            )
            for row in self.rows
        ]
        headings = ("weight", "shape", "block", "zeros", "cost share", "churn")
        return text_table(", ".join(part for part in parts if part), headings, rows, self._notes())

    __repr__ = __str__

    @property
    def emptied(self) -> tuple[str, ...]:
        """The names of the weights of which nothing is kept."""
        return tuple(row.name for row in self.rows if row.sparsity == 1)

    def _notes(self) -> list[str]:
        reasons, kinds = _by_reason(self.skipped), _by_reason(self.dense_products)
        empty = ", ".join(self.emptied)
        kept = [f"nothing is kept (the layer is its bias alone): {empty}"] if empty else []
        head = [] if self.no_head is None else [f"no head: {self.no_head}"]
        dense = [f"multiplied densely, blocks or not (by {kind}): {', '.join(names)}" for kind, names in kinds.items()]
        skipped = [f"not masked ({reason}): {', '.join(names)}" for reason, names in reasons.items()]
        return kept + head + dense + skipped


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def layer_reports(
    layers: Sequence[MaskedTensor], costs: Mapping[str, LayerCost], before: Mapping[str, torch.Tensor]
) -> tuple[LayerReport, ...]:
    """A row for each of `layers`, with costs by name; churn is since the hard masks `before`, by name."""
    spent = sum(cost.kept for cost in costs.values())
    return tuple(
        LayerReport(
            layer.name,
            layer.size.shape,
            layer.carrier.mask_block_size,
            1 - layer.kept() / layer.size.count,
            costs[layer.name].kept / spent if spent else 0.0,
            1 - stability(before[layer.name], layer.shown_mask.hard) if layer.name in before else None,
        )
        for layer in layers
    )


def dense_products(layers: Sequence[MaskedTensor]) -> dict[str, str]:
    """The weights masked by blocks whose products are dense all the same, with the class of each."""
    return {
        layer.name: plain_class(own_class(layer.module)).__name__
        for layer in layers
        if not layer.unstructured and not layer.carrier.mask_multiplies_blocks
    }


def stability(before: torch.Tensor, now: torch.Tensor) -> float:
    """(Blocks kept in both) / (blocks kept in either) of two hard masks; 1 where neither keeps any."""
    either = int((before | now).sum())
    return int((before & now).sum()) / either if either else 1.0


def hidden_matrices(model: nn.Module) -> list[str]:
    """Name the weights of all linear layers but the last, the classifier: what sparsity is counted over."""
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[:-1]


def kept_fractions(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, float], float]:
    """Fraction of non-zeros of each named weight, and the fraction of zeros over all of them."""
    weights = {name: model.get_parameter(name) for name in names}
    kept = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    return {name: kept[name] / weight.numel() for name, weight in weights.items()}, 1 - sum(kept.values()) / total
