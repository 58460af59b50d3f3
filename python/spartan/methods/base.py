"""What every training method is: frozen settings, and what it does to a `MaskSet` at four moments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from spartan.budgets import Distribution, require_distribution
from spartan.masks import MaskSet
from spartan_kernels.arguments import block_shape

__all__ = ["MaskSettings", "Method", "SparseMethod"]

_ROUNDING = 1e-9


class Method(ABC):
    """A way to train sparse: settings only, no state; all state is in the masks and the step.

    `Sparsifier` calls `start` once, `correct_gradients` before and `update` after each optimizer step
    (`masks.step` is then the number of steps made), `resume` when a checkpoint has been loaded, and `finish` before
    the masks are applied for good.
    """

    soft: bool = False
    solves_every_step: bool = False  # whether soft masks are solved for, of the weights, after every step
    preserve_scale: bool = False
    takes_shards: bool = False  # whether it works on the parts of weights that FSDP2 or tensor parallelism divides
    one_optimizer: bool = False  # whether it changes weights for the time of an optimizer's step
    straight_through: bool = False  # without soft masks: whether gradients reach dropped blocks

    @property
    def name(self) -> str:
        """Name in reports and checkpoints."""
        return type(self).__name__

    @property
    def masking(self) -> SparseMethod | None:
        """The method whose settings say what the masks are like; None without masks."""
        return None

    def settings(self) -> dict[str, Any]:
        """The settings as plain types, for checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}  # type: ignore[call-overload]

    def beta_at(self, step: int, total_steps: int) -> float | None:
        """Sharpness of the soft masks after `step` steps, in the method's own units; None without soft masks."""
        return None

    def shortfall(self, total_steps: int) -> str | None:
        """What the method cannot do in so few steps, in words; None if it can do all."""
        return None

    def start(self, masks: MaskSet) -> None:
        """Set the masks of the first forward pass; they keep everything as made."""
        return None

    def resume(self, masks: MaskSet) -> None:
        """Derive again what follows from the step and is not in a checkpoint."""
        return None

    def correct_gradients(self, masks: MaskSet) -> None:
        """Change the final `.grad` before the optimizer reads it."""
        return None

    @abstractmethod
    def update(self, masks: MaskSet) -> None:
        """Change the masks after an optimizer step."""

    @abstractmethod
    def finish(self, masks: MaskSet) -> None:
        """Bring the masks to the sparsity asked for, if training stopped before that."""


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """What masks are to be like: how sparse, in which blocks or pattern, and how layers share a budget.

    Attributes:
        sparsity: fraction of zeros to reach, in [0, 1); with `pattern` it is 1 - n / m and may be left out.
        block_size: 1, an int or (rows, columns): blocks of weights that stay or go together.
        distribution: "global" (one budget over all layers), "uniform", "erk", or the sparsity of some layers by name or
            pattern of names, {"stem.weight": 0.5, "blocks.0.*": 0.8}; the others then share one budget, such that
            the whole has `sparsity`.
        pattern: (n, m), such as (2, 4): of each m neighbours along the input features (or channels) of a masked
            weight n stay. Takes the place of blocks and of the distribution; `sparsity` is that of masked weights.

    Raises:
        TypeError, ValueError: a setting of the wrong type or outside its range, named.
    """

    sparsity: float = None  # type: ignore[assignment]  # a number once it is checked
    block_size: int | tuple[int, int] = 1
    distribution: Distribution = "global"
    pattern: tuple[int, int] | None = None

    takes_pattern = True  # whether masks of n in each m neighbours make sense for the method

    def __post_init__(self) -> None:
        if self.pattern is not None:
            self._settle_pattern(self.pattern)
        require_number("sparsity", self.sparsity, 0.0, 1.0, open_end=True)
        block_shape(self.block_size)
        require_distribution(self.distribution)
        if not isinstance(self.distribution, str):
            object.__setattr__(self, "distribution", dict(self.distribution))

    @property
    def name(self) -> str:
        """Name in reports and checkpoints."""
        return type(self).__name__

    def require_takes_pattern(self, pattern: tuple[int, int]) -> None:
        """Raise ValueError unless masks of n in each m neighbours make sense for the method."""
        if not self.takes_pattern:
            raise ValueError(f"pattern is not for {self.name}, whose masks change by few weights; got {pattern!r}")

    def _settle_pattern(self, pattern: tuple[int, int]) -> None:
        self.require_takes_pattern(pattern)
        n, m = require_pattern(pattern)
        if self.block_size != 1:
            raise ValueError(f"block_size must be 1 with pattern {pattern}; got {self.block_size}")
        object.__setattr__(self, "pattern", (n, m))
        sparsity = 1 - n / m
        if self.sparsity is not None and (
            not isinstance(self.sparsity, float) or abs(self.sparsity - sparsity) > _ROUNDING
        ):
            raise ValueError(f"sparsity must be {sparsity:g} with pattern {pattern}; got {self.sparsity!r}")
        object.__setattr__(self, "sparsity", sparsity)


@dataclass(frozen=True, kw_only=True)
class SparseMethod(MaskSettings, Method):
    """What all methods with masks share: their settings are those of `MaskSettings`.

    Raises:
        TypeError, ValueError: a setting of the wrong type or outside its range, named.
    """

    keeps_zeros = False  # whether it can start from the zeros of a sparse model
    backward_masks = False  # whether it sets, now or then, which blocks need a gradient
    grows_from_zero = False  # whether dropped weights come back with the value zero

    @property
    def masking(self) -> SparseMethod:
        """Itself."""
        return self

    def finish(self, masks: MaskSet) -> None:
        """Select the blocks of largest magnitude within the budget."""
        if not masks.frozen:
            masks.select(1.0)
            masks.freeze()


def require_number(name: str, value: Any, low: float, high: float = math.inf, *, open_end: bool = False) -> None:
    """Raise unless `value` is a number in [low, high], or in [low, high) with `open_end`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    inside = low <= value < high if open_end else low <= value <= high
    if not inside or math.isinf(value):
        raise ValueError(
            f"{name} must be in [{low:g}, {high:g}{')' if open_end or math.isinf(high) else ']'}; got {value}"
        )


def require_pattern(value: Any) -> tuple[int, int]:
    """`value` as (n, m); raise unless it is a pair of ints with 1 <= n < m."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(type(number) is int for number in pair) or not 1 <= pair[0] < pair[1]:
        raise ValueError(f"pattern must be a pair (n, m) of ints with 1 <= n < m, such as (2, 4); got {value!r}")
    return pair[0], pair[1]


def require_keeps_zeros(method: Method, patterns: Iterable[tuple[int, int] | None]) -> None:
    """Raise ValueError unless the method can start from the zeros of a sparse model, and no weight has a pattern."""
    masking = method.masking
    if masking is None or not masking.keeps_zeros:
        raise ValueError(
            f"keep_zeros is not for {method.name}, which begins with all weights; leave it out, or take a method that"
            f" begins with masks, such as GMP, TopKAST or RigL; got {method!r}"
        )
    for pattern in patterns:
        if pattern is not None:
            raise ValueError(
                "keep_zeros is not for a pattern, which keeps n of each m neighbours also where fewer are not zero;"
                f" leave it out, as magnitude drops zeros first; got pattern {pattern}"
            )


def require_interval(value: Any) -> None:
    """Raise unless `value` is a number of steps, an int of at least 1, or a fraction of them, a float in (0, 1)."""
    if type(value) is int and value >= 1:
        return
    if not isinstance(value, float) or not 0 < value < 1:
        raise ValueError(
            "interval must be an int of at least 1 (steps) or a float in (0, 1) (a fraction of all steps);"
            f" got {value!r}"
        )


def steps_of(interval: int | float, total_steps: int) -> int:
    """An interval in steps; a fraction of few steps is one step at least."""
    return interval if isinstance(interval, int) else max(1, round(interval * total_steps))


def changes_in(interval: int | float, total_steps: int, begin: float, end: float) -> int:
    """How often an interval is over after more than the fraction `begin` of the steps and before `end` of them."""
    steps = steps_of(interval, total_steps)
    return max(0, (math.ceil(end * total_steps) - 1) // steps - math.floor(begin * total_steps) // steps)


def too_rare(what: str, interval: int | float, total_steps: int, begin: float, end: float) -> str | None:
    """Words for the case that no interval is over within these fractions of the steps; None if one is."""
    if begin >= end or changes_in(interval, total_steps, begin, end):
        return None
    return (
        f"{what}: interval={interval}, and masks change between steps {begin * total_steps:g} and"
        f" {end * total_steps:g} alone; take a shorter interval, or a fraction of the steps such as interval=0.02"
    )


def require_order(first: str, begin: float, second: str, end: float) -> None:
    """Raise ValueError unless begin <= end."""
    if begin > end:
        raise ValueError(f"{first} must be at most {second} ({end}); got {begin}")
