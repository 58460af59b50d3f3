"""Where the zeros of a model are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["hidden_matrices", "kept_fractions"]


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
