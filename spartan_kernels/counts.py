"""How much a solve over a list had to do, as its kernels counted it."""

from __future__ import annotations

from typing import NamedTuple


class SolveCounts(NamedTuple):
    """Passes over the values before the masks were first written; whether they had to be written again, and after what.

    Attributes:
        passes: surveys that read all values.
        rewrites: 1 where the sum of the soft masks as written missed the budget and they were written again, else 0.
        trials: passes of the search before that second write.
    """

    passes: int
    rewrites: int
    trials: int
