"""What a pruning did, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spartan.saving.tables import text_table

__all__ = ["PrunedLayer", "PruningInterrupted", "PruningResult"]

_NAMED = 3  # parameters that are not pruned for one reason; the more would fill pages


@dataclass(frozen=True)
class PrunedLayer:
    """A pruned weight.

    Attributes:
        name, shape: of the weight. block_size: (rows, columns) of its blocks. pattern: (n, m) or None.
        sparsity: fraction of zeros in it.
        error_before: squared error of its outputs on the calibration inputs if the mask alone is applied, as a fraction
            of their squares; None where it was not measured.
        error: the same of the weight as it is now: smaller where the method changes what stays.
        seconds: that it took, with the runs of the model up to it.
        note: what there is to know of it, such as a singular Hessian.
    """

    name: str
    shape: tuple[int, ...]
    block_size: tuple[int, int]
    pattern: tuple[int, int] | None
    sparsity: float
    error_before: float | None
    error: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True, repr=False)
class PruningResult:
    """The pruned weights in the order in which the model calls them; `print` shows a table.

    Attributes:
        method: its name.
        sparsity: fraction of zeros in the weights that were to be pruned.
        rows: one for each pruned weight. skipped: why the other parameters are not pruned, by name.
        left: the weights that an interruption left dense, in order; empty when all is done.
    """

    method: str
    sparsity: float
    rows: tuple[PrunedLayer, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                "x".join(map(str, row.block_size)) if row.pattern is None else f"{row.pattern[0]}:{row.pattern[1]}",
                f"{row.sparsity:.2%}",
                _shown(row.error_before),
                _shown(row.error),
                f"{row.seconds:.2f}",
            )
            for row in self.rows
        ]
        seconds = sum(row.seconds for row in self.rows)
        title = f"{self.method}: {self.sparsity:.2%} zeros in {len(self.rows)} weights, {seconds:.1f} s"
        headings = ("weight", "shape", "block", "zeros", "error before", "error after", "seconds")
        return text_table(title, headings, rows, self._notes())

    __repr__ = __str__

    def _notes(self) -> list[str]:
        notes = [f"{row.name}: {row.note}" for row in self.rows if row.note]
        if self.left:
            notes.append(f"not reached, dense: {', '.join(self.left)}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        return notes + [f"not pruned ({reason}): {_some(names)}" for reason, names in reasons.items()]


class PruningInterrupted(KeyboardInterrupt):
    """Ctrl-C while a model was pruned: it is valid, its first layers are pruned, the others as they were.

    Attributes:
        result: what was done; `result.left` are the weights that are still dense.
    """

    def __init__(self, result: PruningResult) -> None:
        self.result = result
        done = len(result.rows)
        super().__init__(
            f"stopped at {result.left[0]!r}: {done} of {done + len(result.left)} weights are pruned, the others are as"
            " they were, and the model is valid"
        )


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"


def _some(names: list[str]) -> str:
    """The first names of many."""
    more = len(names) - _NAMED
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:_NAMED])} and {more} more"
