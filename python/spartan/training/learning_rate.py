"""The learning rate of a run."""

from __future__ import annotations

import math

__all__ = ["warmup_cosine"]


def warmup_cosine(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Linear up to `peak` over the first `warmup` of the steps, then down to zero: peak (1 + cos(pi x)) / 2."""
    warmup_steps = warmup * total_steps
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
