"""What the accuracy table compares: methods and their settings, and the runs in order of value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.accuracy_subjects import CONVOLUTIONAL, CONVOLUTIONAL_FLOPS, LANGUAGE, NORMALISED, PLAIN, TRANSFORMER
from spartan.masks import MaskSet
from spartan.methods import (
    DPF,
    GMP,
    GSE,
    IHT,
    SET,
    SRSTE,
    WGSEF,
    Dense,
    DualAveraging,
    MaskDecay,
    Method,
    OneShot,
    Powerpropagation,
    RigL,
    Spartan,
    StaticRandom,
    TopKAST,
)
from spartan.methods.spartan import PUBLISHED


@dataclass(frozen=True, kw_only=True)
class SpartanWithoutCoupling(Spartan):
    """Spartan as it would be without the gradient's coupling term: the ablation.

    Each weight's gradient is then its own part of equation (2), as if the threshold of the soft mask stood still.
    """

    def correct_gradients(self, masks: MaskSet) -> None:
        """Leave `.grad` as autograd made it."""


def _spartan(method: type[Spartan] = Spartan, **settings: Any) -> Callable[..., Method]:
    def build(seed: int, **sparse: Any) -> Method:
        return method(**sparse, **settings)

    return build


def _top_kast(seed: int, sparsity: float, block_size: int) -> Method:
    """Train twice as many weights as are multiplied by, as the paper does at 90% and 95%."""
    backward = round(2 * sparsity - 1, 6)
    return TopKAST(sparsity=sparsity, block_size=block_size, backward_sparsity=backward, **INTERVAL)


TOLERANCES = (0.01, 0.1, 0.3)  # of the soft mask, under which blocks get no weight gradient
SCALED: dict[str, Any] = {"preserve_scale": True}
UNSCALED: dict[str, Any] = {"preserve_scale": False}
INTERVAL: dict[str, Any] = {"interval": 100}  # steps, as published; the defaults are fractions of the run

# By name in the table, with the class's defaults but for what is given here; masks drawn at random differ by seed.
METHODS: dict[str, Callable[..., Method]] = {
    "Spartan": _spartan(),
    "Spartan, preserve_scale=False": _spartan(**UNSCALED),
    **{
        f"Spartan, preserve_scale=False, tolerance {tolerance:g}": _spartan(**UNSCALED, backward_tolerance=tolerance)
        for tolerance in TOLERANCES
    },
    "Spartan, published": _spartan(**PUBLISHED),
    "Spartan, published, preserve_scale": _spartan(**PUBLISHED | SCALED),
    "Spartan, published, no coupling": _spartan(SpartanWithoutCoupling, **PUBLISHED),
    "Spartan, published, preserve_scale, no coupling": _spartan(SpartanWithoutCoupling, **PUBLISHED | SCALED),
    "Dual averaging": lambda seed, **sparse: DualAveraging(**sparse),
    "RigL": lambda seed, **sparse: RigL(**sparse, **INTERVAL, seed=seed),
    "GMP": lambda seed, **sparse: GMP(**sparse, **INTERVAL),
    "Top-KAST": _top_kast,
    "One-shot": lambda seed, **sparse: OneShot(**sparse),
    "Static random": lambda seed, **sparse: StaticRandom(**sparse, seed=seed),
    "DPF": lambda seed, **sparse: DPF(**sparse, interval=16),
    "IHT": lambda seed, **sparse: IHT(**sparse),
    "SET": lambda seed, **sparse: SET(**sparse, **INTERVAL, seed=seed),
    "GSE": lambda seed, **sparse: GSE(**sparse, **INTERVAL, seed=seed),
    "WGSEF": lambda seed, **sparse: WGSEF(**sparse),
    "Powerpropagation, dual averaging": lambda seed, **sparse: Powerpropagation(method=DualAveraging(**sparse)),
    "Spartan, 2:4": _spartan(pattern=(2, 4)),
    "SR-STE, 2:4": lambda seed, **sparse: SRSTE(**sparse),
    "Mask decay, 2:4": lambda seed, **sparse: MaskDecay(**sparse),
    "One-shot, 2:4": lambda seed, **sparse: OneShot(**sparse, pattern=(2, 4)),
}
DENSE = "Dense"


@dataclass(frozen=True)
class Run:
    """One training: a cell of the table, and a seed."""

    model: str
    method: str
    sparsity: float
    block: int
    seed: int

    def build(self) -> Method:
        """Make the training method.

        Raises:
            ValueError: `method` is none of the table's.
        """
        if self.method == DENSE:
            return Dense()
        if self.method not in METHODS:
            raise ValueError(f"method must be {DENSE} or one of {', '.join(METHODS)}; got {self.method!r}")
        return METHODS[self.method](self.seed, sparsity=self.sparsity, block_size=self.block)


@dataclass(frozen=True)
class Part:
    """Methods at sparsities of one model, in blocks of one size."""

    model: str
    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    block: int = 1

    def runs(self, seeds: Sequence[int]) -> Iterator[Run]:
        """Its runs: seed by seed, so that an early end leaves whole comparisons."""
        for sparsity in self.sparsities:
            for seed in seeds:
                for method in self.methods:
                    yield Run(self.model, method, sparsity, self.block, seed)


MAIN = ("Spartan", "Spartan, published", "Dual averaging", "RigL", "GMP")
OTHERS = ("Top-KAST", "One-shot", "Static random")
SCALE_KEPT = ("Spartan", "Spartan, published, preserve_scale", "Spartan, published", "Dual averaging")
RELATIVES = ("DPF", "IHT", "SET", "GSE", "WGSEF", "Powerpropagation, dual averaging")
PATTERNS = ("Spartan, 2:4", "SR-STE, 2:4", "Mask decay, 2:4", "One-shot, 2:4")
BLOCKS = ("Spartan", "Spartan, preserve_scale=False", "Dual averaging", "RigL", "GMP", "One-shot")
RESIDUAL = ("Spartan", "Dual averaging", "RigL", "GMP")

PLAN = (
    Part(NORMALISED, (DENSE,), (0.0,)),
    Part(PLAIN, (DENSE,), (0.0,)),
    Part(NORMALISED, MAIN, (0.98, 0.99)),
    Part(PLAIN, SCALE_KEPT, (0.98, 0.99)),
    Part(NORMALISED, BLOCKS, (0.90,), block=16),
    Part(NORMALISED, MAIN, (0.95, 0.90)),
    Part(PLAIN, SCALE_KEPT, (0.95, 0.90)),
    Part(TRANSFORMER, (DENSE,), (0.0,)),
    Part(TRANSFORMER, RESIDUAL, (0.80, 0.90), block=16),
    Part(LANGUAGE, (DENSE,), (0.0,)),
    Part(LANGUAGE, RESIDUAL, (0.80,)),
    Part(NORMALISED, ("Top-KAST", "Static random"), (0.98,)),
    Part(CONVOLUTIONAL, (DENSE,), (0.0,)),
    Part(CONVOLUTIONAL, MAIN, (0.90, 0.95)),
    Part(CONVOLUTIONAL_FLOPS, MAIN, (0.90,)),
    Part(NORMALISED, BLOCKS, (0.80,), block=16),
    Part(NORMALISED, OTHERS, (0.90, 0.95, 0.98, 0.99)),
    Part(NORMALISED, ("Spartan, published, no coupling",), (0.98,)),
    Part(NORMALISED, tuple(name for name in METHODS if "tolerance" in name), (0.90,), block=16),
    Part(PLAIN, ("RigL", "GMP"), (0.98, 0.95, 0.99, 0.90)),
    Part(PLAIN, ("Spartan, published, preserve_scale, no coupling",), (0.98,)),
    Part(NORMALISED, RELATIVES, (0.98,)),
    Part(NORMALISED, PATTERNS, (0.50,)),
    Part(PLAIN, OTHERS, (0.98,)),
)


def planned(seeds: Sequence[int]) -> list[Run]:
    """Every run once, in the plan's order."""
    return list(dict.fromkeys(run for part in PLAN for run in part.runs(seeds)))
