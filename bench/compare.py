"""Is it slower than before? A verdict that knows how noisy both measurements were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.run import Report, Result
from bench.timing import Sample

_LEAST_CHANGE = 0.05  # smaller changes are never called
_MOST_NOISE = 0.25  # noisier pairs are never judged
_SIGMAS = 3.0


@dataclass(frozen=True)
class Verdict:
    """Change of one case: new / old time, each relative to the ceiling measured in its own process."""

    case: str
    change: float
    noise: float
    word: str  # "slower", "faster", "same", "too noisy", "new", "wrong"


def _sigma(sample: Sample) -> float:
    """Relative standard error of a median, from the interquartile range."""
    return sample.spread / 1.349 * 1.253 / math.sqrt(len(sample.values))


def _relative(result: Result, report: Report) -> tuple[float, float]:
    assert result.time is not None
    ceiling = report.matmul if result.flops else report.copy
    noise = math.hypot(_sigma(result.time), ceiling.spread / 1.349)
    return result.time.median / ceiling.median, noise


def compare(new: Report, old: Sequence[Report]) -> list[Verdict]:
    """One verdict for each case of `new`.

    A change is called when it exceeds 5%, and three standard errors of medians and ceilings together.
    """
    before = {r.case: (r, report) for report in old for r in report.results if r.time is not None}
    verdicts = []
    for result in new.results:
        if result.wrong is not None:
            verdicts.append(Verdict(result.case, math.nan, 0.0, "wrong"))
        elif result.case not in before:
            verdicts.append(Verdict(result.case, math.nan, 0.0, "new"))
        else:
            (now, noise_now), (then, noise_then) = _relative(result, new), _relative(*before[result.case])
            noise = math.hypot(noise_now, noise_then)
            verdicts.append(Verdict(result.case, now / then, noise, _word(now / then, noise)))
    return verdicts


def _word(change: float, noise: float) -> str:
    threshold = max(_LEAST_CHANGE, _SIGMAS * noise)
    if change > 1 + threshold:
        return "slower"
    if change < 1 / (1 + threshold):
        return "faster"
    return "too noisy" if noise > _MOST_NOISE else "same"
