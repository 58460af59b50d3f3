"""Layer after layer: collect what goes into it, score its blocks, change it, and say what that did."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from spartan.pruning.base import Pruner, weight_of
from spartan.pruning.forwards import Forwards
from spartan.pruning.layers import Layer
from spartan.pruning.plan import Planned
from spartan.pruning.result import PrunedLayer, PruningInterrupted, PruningResult
from spartan.pruning.selection import Budget, kept_cost
from spartan.pruning.statistics import Statistics, collected
from spartan.training.progress import Progress

__all__ = ["Steps"]

_IDLE = "its inputs were all zero, or none: it is pruned as if they were independent and of one size"


class Steps:
    """The pass over the layers of a model, once or twice.

    Args:
        method: what is done to each.
        layers: all of them, as `forwards` knows them by index.
        forwards: where their inputs come from; None: nothing is asked of these.
        errors: whether to measure errors.
    """

    def __init__(self, method: Pruner, layers: Sequence[Layer], forwards: Forwards | None, *, errors: bool) -> None:
        self._method, self._forwards, self._errors = method, forwards, errors
        self._names = [layer.name for layer in layers]
        stops = [] if forwards is None else forwards.stops
        seen = {index for stop in stops for index in stop}
        self._stops = [*stops, *([index] for index in range(len(layers)) if index not in seen)]
        self._seen = seen
        self._idle = False  # whether nothing but zeros went into the layers of this stop

    def scores(self, layers: Sequence[Layer]) -> list[torch.Tensor]:
        """What dropping each block adds to the squared errors of outputs, each as a fraction of the output's variance.

        Of a method that does not look at inputs, its scores as they are.
        """
        scorer = self._method.scorer
        if not scorer.needs_inputs:
            return [scorer.scores(layer, None) for layer in layers]
        own = {layer.name: layer for layer in layers}
        found = {}
        for stop, seen in self._through(own, products=True):
            for name in stop:
                assert seen is not None
                relative = seen.spread(own[name].matrices(weight_of(own[name])))
                found[name] = scorer.scores(own[name], seen, relative).float()
        if self._forwards is not None:
            self._forwards.restart()
        return [found[layer.name] for layer in layers]

    def run(self, plan: Mapping[str, Planned], skipped: Mapping[str, str], bar: Progress) -> PruningResult:
        """Prune all layers of a plan.

        Raises:
            PruningInterrupted: Ctrl-C.
        """
        rows: dict[str, PrunedLayer] = {}
        order = [self._names[index] for stop in self._stops for index in stop if self._names[index] in plan]
        try:
            self._prune(plan, rows, bar)
        except KeyboardInterrupt:
            left = [name for name in order if name not in rows]
            if not left:
                raise
            raise PruningInterrupted(self._result(plan, rows, skipped, left)) from None
        except Exception:
            left = [name for name in order if name not in rows]
            if rows and left:
                warnings.warn(
                    f"pruning stopped at {left[0]!r}: {len(rows)} of {len(order)} weights are pruned, the others are as"
                    " they were, and the model is valid",
                    stacklevel=3,
                )
            raise
        return self._result(plan, rows, skipped, [])

    def _prune(self, plan: Mapping[str, Planned], rows: dict[str, PrunedLayer], bar: Progress) -> None:
        left_over: dict[int, float] = {}
        begun = time.perf_counter()
        for names, seen in self._through(plan, products=self._method.needs_products or self._errors):
            shared = (time.perf_counter() - begun) / len(names)
            for name in names:
                begun = time.perf_counter()
                row = self._prune_one(plan[name], seen, left_over)
                rows[name] = replace(row, seconds=time.perf_counter() - begun + shared)
                bar.update(len(rows), lambda name=name: name)  # type: ignore[misc]
            begun = time.perf_counter()

    def _through(
        self, plan: Mapping[str, Planned] | Mapping[str, Layer], *, products: bool
    ) -> Iterator[tuple[list[str], Statistics | None]]:
        """The layers of a plan in the order of calls, those of a stop together, with what goes into them now."""
        for stop in self._stops:
            names = [self._names[index] for index in stop if self._names[index] in plan]
            if not names:
                continue
            seen = None
            if self._forwards is not None and stop[0] in self._seen and (self._method.needs_inputs or self._errors):
                seen = collected(self._forwards.inputs(stop), names[0], products=products)
                self._idle = seen.settle()
            yield names, seen
            if self._forwards is not None:
                self._forwards.finish(stop)

    def _prune_one(self, planned: Planned, seen: Statistics | None, left_over: dict[int, float]) -> PrunedLayer:
        layer, part = planned.layer, planned.part
        budget = None
        if planned.amount is not None:
            given = 0.0 if part is None else left_over.get(part, 0.0)
            budget = Budget(layer, min(planned.amount + given, layer.capacity))
        before = weight_of(layer).clone()
        pruned = self._method.prune(layer, seen, budget)
        stays = layer.expand(pruned.mask)
        now = torch.where(stays, pruned.values, 0.0).to(layer.values().dtype)
        if part is not None and planned.amount is not None:
            left_over[part] = planned.amount + given - kept_cost(pruned.mask, layer.costs)
        error_before = error = None
        if seen is not None and self._errors and not self._idle:
            error_before = _error(layer, seen, before, torch.where(stays, before, 0.0))
            error = _error(layer, seen, before, now.to(before.dtype))
        layer.write(now)  # last, so that an interruption leaves a layer either as it was or done
        return PrunedLayer(
            layer.name,
            tuple(layer.candidate.weight.shape),
            layer.block_size,
            layer.pattern,
            layer.zeros() / layer.candidate.weight.numel(),
            error_before,
            error,
            0.0,
            _IDLE if seen is not None and self._idle else pruned.note,
        )

    def _result(
        self,
        plan: Mapping[str, Planned],
        rows: Mapping[str, PrunedLayer],
        skipped: Mapping[str, str],
        left: Sequence[str],
    ) -> PruningResult:
        weights = [one.layer.candidate.weight for one in plan.values()]
        zeros = sum(one.layer.zeros() for one in plan.values()) / sum(weight.numel() for weight in weights)
        return PruningResult(self._method.name, zeros, tuple(rows.values()), dict(skipped), tuple(left))


def _error(layer: Layer, seen: Statistics, before: torch.Tensor, now: torch.Tensor) -> float:
    """Squared error of the outputs, as a fraction of their squares."""
    energy = float(seen.energy(layer.matrices(before)))
    return float(seen.energy(layer.matrices(before - now))) / energy if energy > 0 else 0.0
