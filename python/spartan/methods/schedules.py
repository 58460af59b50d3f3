"""Schedules: frozen, pure functions of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

__all__ = ["Cosine", "Cubic", "Exponential", "Linear", "Schedule"]


@dataclass(frozen=True)
class Schedule(ABC):
    """A quantity that depends on the step only: `schedule(step) -> float`."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Value at `step`, the number of optimizer steps made so far."""


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From `start` to `end` between two steps, constant outside; x in [0, 1] is the part of the way in steps.

    Raises:
        ValueError: end_step before begin_step.
    """

    start: float
    end: float
    begin_step: float
    end_step: float

    def __post_init__(self) -> None:
        if self.end_step < self.begin_step:
            raise ValueError(f"end_step must be at least begin_step {self.begin_step}; got {self.end_step}")

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        if step >= self.end_step:
            return self.end
        if step <= self.begin_step:
            return self.start
        x = (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.start + (self.end - self.start) * self._shape(x)

    @abstractmethod
    def _shape(self, x: float) -> float:
        """Part of the way in value at the part x in (0, 1) of the way in steps."""


@dataclass(frozen=True)
class Linear(_Ramp):
    """start + (end - start) x."""

    def _shape(self, x: float) -> float:
        return x


@dataclass(frozen=True)
class Cubic(_Ramp):
    """end + (start - end) (1 - x)^3, the ramp of gradual magnitude pruning (Zhu and Gupta, 2017)."""

    def _shape(self, x: float) -> float:
        return 1 - (1 - x) ** 3


@dataclass(frozen=True)
class Cosine(_Ramp):
    """start + (end - start) (1 - cos(pi x)) / 2."""

    def _shape(self, x: float) -> float:
        return (1 - math.cos(math.pi * x)) / 2


@dataclass(frozen=True)
class Exponential(_Ramp):
    """end + (start - end) exp(-rate x) before `end_step`; what is left then goes at once."""

    rate: float

    def _shape(self, x: float) -> float:
        return 1 - math.exp(-self.rate * x)
